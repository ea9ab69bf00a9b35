"""The line in front of the engine: order, limits, clients that leave, loading and stopping."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import make_served

from llm.engine.request import Request, SamplingParams
from llm.serving.api import ApiSettings, create_app
from llm.serving.errors import ApiError, ClientGoneError
from llm.serving.loop import EngineWorker, Served
from llm.serving.requests import Limits


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

    def make(max_queue: int = 4, **engine: object) -> EngineWorker:
        worker = EngineWorker(lambda: make_served(**engine), max_queue)
        workers.append(worker)
        worker.start()
        worker.wait_loaded()
        return worker

    yield make
    for worker in workers:
        worker.close()


def test_one_at_a_time_in_order_on_one_thread(make_worker: Callable[..., EngineWorker]) -> None:
    worker = make_worker(max_queue=10, delay=0.005)
    finished = []

    def ask(number: int) -> None:
        with worker.turn(stays):
            list(worker.stream(Request([number], SamplingParams()), stays))
            finished.append(number)

    threads = []
    for number in range(6):
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
        wait_for(lambda n=number: worker.num_running + worker.num_waiting + len(finished) > n)
    for thread in threads:
        thread.join()
    engine = worker.served.engine
    assert finished == [0, 1, 2, 3, 4, 5]
    assert [ids for ids, _ in engine.calls] == [[n] for n in range(6)]
    assert engine.most_running == 1
    assert len(engine.threads) == 1


def test_a_full_line_refuses_with_a_time_to_come_back(
    make_worker: Callable[..., EngineWorker],
) -> None:
    worker = make_worker(max_queue=1)
    release = threading.Event()

    def occupy() -> None:
        with worker.turn(stays):
            release.wait(5)

    threads = [threading.Thread(target=occupy) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: (worker.num_running, worker.num_waiting) == (1, 1))
    with pytest.raises(ApiError, match="1 requests wait already and the limit is 1") as caught:
        worker.turn(stays).__enter__()
    assert (caught.value.status, caught.value.retry_after) == (503, 1)
    release.set()
    for thread in threads:
        thread.join()
    with worker.turn(stays):
        assert (worker.num_running, worker.num_waiting) == (1, 0)


def test_a_client_that_leaves_the_line_frees_its_place(
    make_worker: Callable[..., EngineWorker],
) -> None:
    worker = make_worker()
    with worker.turn(stays):
        with pytest.raises(ClientGoneError):
            worker.turn(lambda: True).__enter__()
        assert worker.num_waiting == 0


def test_a_client_that_leaves_stops_a_slow_engine(
    make_worker: Callable[..., EngineWorker], tmp_path: Path
) -> None:
    worker = make_worker(repeat=True, gate=str(tmp_path))
    gone = threading.Event()
    threading.Timer(0.05, gone.set).start()
    with pytest.raises(ClientGoneError):
        list(worker.stream(Request([1], SamplingParams(max_new_tokens=1000)), gone.is_set))
    engine = worker.served.engine
    assert engine.steps == 0, "noticed before the engine made its first token"
    (tmp_path / "0").touch()
    wait_for(lambda: engine.running == 0)
    assert engine.steps == 1


def test_closing_the_stream_closes_the_engine(make_worker: Callable[..., EngineWorker]) -> None:
    worker = make_worker(repeat=True, delay=0.01)
    steps = worker.stream(Request([1], SamplingParams(max_new_tokens=1000)), stays)
    next(steps)
    steps.close()
    engine = worker.served.engine
    wait_for(lambda: engine.running == 0)
    assert engine.steps < 5


def test_loading_is_answered_with_503() -> None:
    go_on = threading.Event()

    def load() -> Served:
        go_on.wait(5)
        return make_served()

    worker = EngineWorker(load, max_queue=1)
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


def test_load_failure_reaches_the_main_thread() -> None:
    def load() -> Served:
        raise ValueError("no program there")

    worker = EngineWorker(load, max_queue=1)
    worker.start()
    with pytest.raises(ValueError, match="no program there"):
        worker.wait_loaded()
    assert worker.status == "failed"


def test_closing_the_worker_ends_running_and_waiting_requests(
    make_worker: Callable[..., EngineWorker],
) -> None:
    worker = make_worker(repeat=True, delay=0.01)
    engine = worker.served.engine
    errors = []

    def ask() -> None:
        try:
            with worker.turn(stays):
                list(worker.stream(Request([1], SamplingParams(max_new_tokens=100_000)), stays))
        except ApiError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: worker.num_waiting == 2)
    worker.close()
    for thread in threads:
        thread.join(60)  # the answer would take a thousand seconds
    assert not any(thread.is_alive() for thread in threads)
    assert [(e.status, e.code) for e in errors] == [(503, "stopping")] * 3
    assert engine.running == 0
