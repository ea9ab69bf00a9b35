"""Requests that are answered together: limits, clients that leave, loading and stopping."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fakes import LocalWorker, make_served

from common.errors import UserError
from llm.engine.request import Request, SamplingParams
from llm.serving import loop
from llm.serving.api import create_app
from llm.serving.errors import ApiError, ClientGoneError
from llm.serving.loop import EngineWorker
from llm.serving.requests import Limits
from llm.serving.steps import Loaded
from llm.serving.web import ApiSettings


def stays() -> bool:
    return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "waited five seconds in vain"
        time.sleep(0.005)


@pytest.fixture
def make_worker() -> Iterator[Callable[..., EngineWorker]]:
    workers = []

    def make(max_queue: int = 4, max_queue_delay: float = 0.0, **engine: object) -> EngineWorker:
        worker = LocalWorker(
            lambda: make_served(**engine), max_queue, max_queue_delay=max_queue_delay
        )
        workers.append(worker)
        worker.start()
        worker.wait_loaded()
        return worker

    yield make
    for worker in workers:
        worker.close()


def ask(worker: EngineWorker, request: Request, gone: Callable[[], bool] = stays) -> list[int]:
    """The ids of one answer."""
    ids = []
    with closing(worker.open([request], gone)) as tokens:
        for _, token in tokens:
            ids.append(token.token_id)
            if token.finish_reason:
                break
    return ids


def in_threads(count: int, work: Callable[[int], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_many_together_on_one_thread(make_worker: Callable[..., EngineWorker]) -> None:
    worker = make_worker(max_queue=10, delay=0.05, max_sequences=4)
    answers = {}

    def work(number: int) -> None:
        answers[number] = ask(worker, Request([number], SamplingParams()))

    for thread in in_threads(6, work):
        thread.join()
    engine = worker.served.engine
    assert len(answers) == 6 and len({tuple(ids) for ids in answers.values()}) == 1
    assert sorted(ids for ids, _ in engine.calls) == [[n] for n in range(6)]
    assert engine.most_running == 4
    assert len(engine.threads) == 1
    assert (worker.num_running, worker.num_waiting) == (0, 0)


@pytest.mark.parametrize(
    ("wait", "places", "together"), [(0.0, 4, 1), (5.0, 2, 2), (0.4, 4, 2), (5.0, 1, 1)]
)
def test_an_idle_engine_waits_for_company(
    make_worker: Callable[..., EngineWorker], wait: float, places: int, together: int
) -> None:
    """``max_queue_delay_microseconds``: for a while, and no longer than there is room."""
    worker = make_worker(max_queue_delay=wait, max_sequences=places)
    began = time.monotonic()

    def work(number: int) -> None:
        time.sleep(0.15 * number)
        ask(worker, Request([number], SamplingParams(max_new_tokens=1)))

    for thread in in_threads(2, work):
        thread.join()
    assert worker.served.engine.most_running == together
    assert time.monotonic() - began < 3


def test_choices_of_one_request_come_mixed(make_worker: Callable[..., EngineWorker]) -> None:
    worker = make_worker()
    params = SamplingParams(max_new_tokens=2)
    with closing(worker.open([Request([1], params, n) for n in range(3)], stays)) as tokens:
        order = [number for _, (number, _) in zip(range(6), tokens, strict=False)]
    assert order == [0, 1, 2, 0, 1, 2]


def test_fast_steps_are_told_together_and_slow_ones_each(
    make_worker: Callable[..., EngineWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    for delay, fewest, most in ((0.001, 2, 20), (0.04, 24, 32)):  # a busy machine may hold a few
        worker = make_worker(repeat=True, delay=delay, answer="abcd")
        told: list[int] = []
        take = loop._Answers.take

        def counted(self: Any, events: Any, told: list[int] = told, take: Any = take) -> None:
            told.append(len(events))
            take(self, events)

        monkeypatch.setattr(loop._Answers, "take", counted)
        ids = ask(worker, Request([1], SamplingParams(max_new_tokens=32)))
        assert ids == worker.served.engine.answer * 8
        monkeypatch.setattr(loop._Answers, "take", take)
        assert fewest <= len(told) <= most and told[0] == 1, "the first token does not wait"


def test_a_dropped_answer_ends_and_the_others_go_on(
    make_worker: Callable[..., EngineWorker],
) -> None:
    worker = make_worker(repeat=True, delay=0.005)
    params = SamplingParams(max_new_tokens=100)
    with closing(worker.open([Request([1], params), Request([2], params)], stays)) as tokens:
        counts, ends = [0, 0], 0
        for number, token in tokens:
            counts[number] += 1
            if counts[0] == 3:
                tokens.drop(0)
            ends += token.finish_reason is not None
            if ends:
                break
    assert counts[0] < 20 and counts[1] == 100


def test_a_request_that_breaks_on_its_way_in_ends_alone(
    make_worker: Callable[..., EngineWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half queued already: nothing of it stays, and the thread that all answers hang on goes on."""
    worker = make_worker()
    engine = worker.served.engine
    add = engine.add

    def breaks(request: Request) -> Any:
        if request.prompt_ids == [13]:
            raise MemoryError("no room for a mask")
        return add(request)

    monkeypatch.setattr(engine, "add", breaks)
    both = [Request([1], SamplingParams()), Request([13], SamplingParams())]
    late = time.monotonic() + 5
    with (
        closing(worker.open(both, lambda: time.monotonic() > late)) as tokens,
        pytest.raises(ApiError) as caught,
    ):
        next(iter(tokens))
    assert caught.value.status == 500 and "no room for a mask" in str(caught.value)
    assert not engine.has_work
    assert ask(worker, Request([1], SamplingParams()))


def test_too_many_are_refused_with_a_time_to_come_back(
    make_worker: Callable[..., EngineWorker], tmp_path: Path
) -> None:
    worker = make_worker(max_queue=1, max_sequences=1, gate=str(tmp_path))
    threads = in_threads(2, lambda number: ask(worker, Request([number], SamplingParams())))
    wait_for(lambda: worker.num_running + worker.num_waiting == 2)
    with pytest.raises(
        ApiError, match=r"1 wait already and the limit is 1 \(--max_queue"
    ) as caught:
        worker.open([Request([9], SamplingParams())], stays)
    assert (caught.value.status, caught.value.retry_after) == (503, 1)
    for number in range(5):
        (tmp_path / str(number)).touch()
    for thread in threads:
        thread.join()
    assert ask(worker, Request([9], SamplingParams()))


def test_a_client_that_leaves_while_it_waits_frees_its_place(
    make_worker: Callable[..., EngineWorker], tmp_path: Path
) -> None:
    worker = make_worker(max_sequences=1, gate=str(tmp_path))
    first = in_threads(1, lambda number: ask(worker, Request([1], SamplingParams())))
    wait_for(lambda: worker.num_running + worker.num_waiting == 1)
    with pytest.raises(ClientGoneError):
        ask(worker, Request([2], SamplingParams()), lambda: True)
    assert worker.num_running + worker.num_waiting == 1
    for number in range(5):
        (tmp_path / str(number)).touch()
    first[0].join()
    wait_for(lambda: not worker.served.engine.has_work)
    assert len(worker.served.engine.calls) <= 2


def test_a_client_that_leaves_stops_a_slow_engine(
    make_worker: Callable[..., EngineWorker], tmp_path: Path
) -> None:
    worker = make_worker(repeat=True, gate=str(tmp_path))
    gone = threading.Event()
    threading.Timer(0.05, gone.set).start()
    with pytest.raises(ClientGoneError):
        ask(worker, Request([1], SamplingParams(max_new_tokens=1000)), gone.is_set)
    engine = worker.served.engine
    assert engine.steps == 0, "noticed before the engine made its first token"
    (tmp_path / "0").touch()
    wait_for(lambda: not engine.has_work)
    assert engine.steps == 1


def test_closing_the_stream_ends_the_answer(make_worker: Callable[..., EngineWorker]) -> None:
    worker = make_worker(repeat=True, delay=0.01)
    stream = worker.open([Request([1], SamplingParams(max_new_tokens=1000))], stays)
    next(iter(stream))
    stream.close()
    engine = worker.served.engine
    wait_for(lambda: not engine.has_work)
    assert engine.steps < 5


def test_loading_is_answered_with_503() -> None:
    go_on = threading.Event()

    def load() -> Loaded:
        go_on.wait(5)
        return make_served()

    worker = LocalWorker(load, max_queue=1)
    client = create_app(worker, ApiSettings(Limits(10, 10))).test_client()
    worker.start()
    assert worker.wait_loaded(timeout=0.01) is False
    health = client.get("/health")
    assert (health.status_code, health.get_json()) == (503, {"status": "loading"})
    for response in (
        client.get("/v1/models"),
        client.post("/v1/completions", json={"prompt": "x"}),
        client.post("/generate", json={"inputs": "x"}),
    ):
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "2"
        assert "loading" in str(response.get_json()["error"])
    go_on.set()
    assert worker.wait_loaded(timeout=5)
    assert client.get("/health").get_json() == {"status": "ok"}
    worker.close()
    assert client.get("/health").get_json() == {"status": "stopping"}
    # What is not asked for an answer goes on: scrapes until the end, and the server's own log.
    assert worker.loaded is not None and worker.loaded.model.name == "fake-llama"
    assert "vllm:request_success_total{" in client.get("/metrics").text


def test_load_failure_reaches_the_main_thread() -> None:
    def load() -> Loaded:
        raise ValueError("no program there")

    worker = LocalWorker(load, max_queue=1)
    worker.start()
    with pytest.raises(ValueError, match="no program there"):
        worker.steps.wait_loaded(5)
    assert worker.status == "loading", "its process ends"


def test_closing_the_worker_ends_running_and_waiting_requests(
    make_worker: Callable[..., EngineWorker],
) -> None:
    worker = make_worker(repeat=True, delay=0.01)
    engine = worker.served.engine
    errors = []

    def work(number: int) -> None:
        try:
            ask(worker, Request([number], SamplingParams(max_new_tokens=100_000)))
        except ApiError as error:
            errors.append(error)

    threads = in_threads(6, work)
    wait_for(lambda: (worker.num_running, worker.num_waiting) == (4, 2))
    worker.close()
    for thread in threads:
        thread.join(60)  # the answer would take a thousand seconds
    assert not any(thread.is_alive() for thread in threads)
    assert [(e.status, e.code) for e in errors] == [(503, "stopping")] * 6
    assert engine.running == 0


def test_adapters_change_between_steps(make_worker: Callable[..., EngineWorker]) -> None:
    """On the engine's thread, also while it answers; what is wrong is told to who asked."""
    worker = make_worker(delay=0.02, repeat=True)
    places: dict[str, str] = {}
    threads = set()

    class Adapters:
        names = property(lambda _: tuple(places))

        def load(self, name: str, directory: str, *, replace: bool) -> None:
            threads.add(threading.current_thread().name)
            if name in places and not replace:
                raise UserError(f"{name} is loaded already")
            places[name] = directory

        def unload(self, name: str) -> None:
            del places[name]

    worker.served.engine.adapters = Adapters()
    worker.change_adapters("de", "/x")
    assert worker.served.names == ("fake-llama", "de")
    request = Request([1], SamplingParams(max_new_tokens=20))
    busy = in_threads(1, lambda _: ask(worker, request))
    wait_for(lambda: worker.num_running == 1)
    worker.change_adapters("fr", "/y")
    assert worker.num_running == 1 and places == {"de": "/x", "fr": "/y"}
    with pytest.raises(UserError, match="de is loaded already"):
        worker.change_adapters("de", "/z")
    worker.change_adapters("de", "/z", replace=True)
    assert places["de"] == "/z"
    worker.change_adapters("de", None)
    assert worker.served.names == ("fake-llama", "fr")
    assert places == {"fr": "/y"} and threads == {"engine"}
    busy[0].join()
    worker.close()
    with pytest.raises(ApiError, match="stopping"):
        worker.change_adapters("de", "/x")
