"""Answers that outlive their readers."""

import asyncio
import random
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import pytest

from llm.serving.page.runs import Run, Runs

Event = dict[str, Any]


def text(said: str, first: int, *html: str, **more: Any) -> Event:
    figures = {"usage": {"completion_tokens": len(said)}, "first": 0.1, "seconds": 0.2}
    event = {"type": "text", "text": said, "from": first, "html": [*html]}
    return event | {"tokens": [], "calls": [], **figures, **more}


END = {"type": "end", "finish": "stop", "usage": {}, "first": 0.1, "from": 0, "html": []}
OLD, NEW = "a" * 24, "b" * 24


class Answer:
    """Events that come when they are let through."""

    def __init__(self, events: Iterable[Event], hold: bool = False) -> None:
        self.events, self.gate = list(events), asyncio.Event()
        self.closed = False
        if not hold:
            self.gate.set()

    async def __call__(self) -> AsyncGenerator[Event, None]:
        try:
            for event in self.events:
                yield event
                await asyncio.sleep(0)
            await self.gate.wait()
            yield END
        finally:
            self.closed = True


async def heard(run: Run, pause: float = 0.0) -> list[Event]:
    events = []
    async for event in run.follow():
        events.append(event)
        await asyncio.sleep(pause)
    return events


def folded(events: Iterable[Event]) -> Event:
    """What a browser has in the end."""
    whole: Event = {"text": "", "html": [], "tokens": [], "calls": []}
    for event in events:
        for name in ("text", "tokens", "calls"):
            whole[name] += event.get(name, whole[name][:0])
        if "html" in event:
            whole["html"] = whole["html"][: event["from"]] + event["html"]
    return whole


def random_answer(draw: random.Random) -> list[Event]:
    events, blocks = [], 0
    for number in range(draw.randrange(1, 12)):
        first = draw.randrange(blocks + 1)
        html = [f"<p>{number}.{n}</p>" for n in range(draw.randrange(1, 4))]
        blocks = first + len(html)
        more = {"tokens": [number], "calls": [number] if draw.random() < 0.3 else []}
        said = "" if more["calls"] else str(number)  # as models do
        events.append(text(said, first, *html, **more))
    return events


@pytest.mark.parametrize("seed", range(20))
def test_whoever_comes_late_or_reads_slowly_hears_the_whole_answer(seed: int) -> None:
    draw = random.Random(seed)
    events = [{"type": "left_out", "messages": 2}, *random_answer(draw)]
    blocks = folded(events)["html"]
    end = {**END, "from": len(blocks) // 2, "html": ["<p>end</p>"]}

    async def source() -> AsyncGenerator[Event, None]:
        for event in [*events, end]:
            await asyncio.sleep(draw.choice([0, 0.001]))
            yield event

    async def late(run: Run, delay: float) -> list[Event]:
        await asyncio.sleep(delay)
        return await heard(run, draw.choice([0, 0.001, 0.005]))

    async def all_readers() -> list[list[Event]]:
        run = Runs().begin(NEW, "", source())
        return await asyncio.gather(*(late(run, delay) for delay in (0, 0.001, 0.004, 0.05)))

    for reader in asyncio.run(all_readers()):
        assert folded(reader) == folded([*events, end])
        assert [event["type"] for event in reader].count("left_out") == 1
        assert reader[-1]["type"] == "end" and reader[-1]["finish"] == "stop"


def test_an_answer_ends_when_nobody_has_followed_it_for_a_while() -> None:
    async def alone() -> None:
        answer = Answer([text("half", 0, "<p>half</p>")], hold=True)
        runs = Runs(patience=0.1)
        run = runs.begin(NEW, "", answer())
        reading = asyncio.create_task(heard(run))
        await asyncio.sleep(0.3)
        assert not answer.closed, "somebody reads"
        reading.cancel()
        await asyncio.sleep(0.05)
        assert not answer.closed, "a reload is quicker than this"
        reading = asyncio.create_task(heard(run))
        await asyncio.sleep(0.3)
        assert not answer.closed, "somebody reads again"
        reading.cancel()
        await asyncio.wait_for(run.task, 1)
        assert answer.closed, "the engine is free"
        first, end = await heard(runs.find(NEW, ""))
        assert first["text"] == "half" and end["finish"] == "interrupted"
        assert first["usage"] == end["usage"] == {"completion_tokens": 4}, "what it has come to"
        assert (end["first"], end["seconds"]) == (0.1, 0.2)

    asyncio.run(alone())


def test_an_answer_whose_browser_has_gone_before_it_began_ends_too() -> None:
    async def never_read() -> None:
        answer = Answer([text("half", 0)], hold=True)
        await asyncio.wait_for(Runs(patience=0.05).begin(NEW, "", answer()).task, 1)
        assert answer.closed

    asyncio.run(never_read())


def test_stopping_ends_it_for_all_who_follow() -> None:
    async def stop() -> None:
        answer = Answer([text("half", 0, "<p>half</p>")], hold=True)
        run = Runs().begin(NEW, "", answer())
        readers = [asyncio.create_task(heard(run)) for _ in range(2)]
        await asyncio.sleep(0.05)
        run.stop()
        for events in await asyncio.wait_for(asyncio.gather(*readers), 1):
            assert [event["type"] for event in events] == ["text", "end"]
            assert events[-1]["finish"] == "stopped"
        assert answer.closed

    asyncio.run(stop())


def test_errors_are_heard_and_surprises_are_none_to_wait_for(caplog) -> None:
    error = {"type": "error", "message": "no", "code": "gone", "status": 503}

    async def source(last: Event | Exception) -> AsyncGenerator[Event, None]:
        yield text("half", 0)
        if isinstance(last, Exception):
            raise last
        yield last

    async def hear(last: Event | Exception) -> list[Event]:
        return await asyncio.wait_for(heard(Runs().begin(NEW, "", source(last))), 1)

    assert asyncio.run(hear(error))[1:] == [error]
    assert asyncio.run(hear(KeyError("x")))[1]["code"] == "broke_off"
    assert "KeyError" in caplog.text


def test_who_may_follow_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.serving.page.runs._KEPT", 1)

    async def ask() -> None:
        runs = Runs()
        old = runs.begin(OLD, "Bearer k", Answer([])())
        assert runs.find(OLD, "Bearer k") is old
        assert runs.find(OLD, "Bearer other") is runs.find(NEW, "Bearer k") is None
        await old.task
        await asyncio.sleep(0)
        assert runs.find(OLD, "Bearer k") is old, "it has ended, and is still there"
        await runs.begin(NEW, "", Answer([])()).task
        await asyncio.sleep(0)
        assert runs.find(OLD, "Bearer k") is None, "others have ended since"
        assert runs.find(NEW, "") is not None

    asyncio.run(ask())


def test_a_server_that_ends_interrupts_what_is_under_way():
    """Its readers would hold it up."""

    async def check() -> None:
        runs, answer = Runs(), Answer([text("a", 0, "<p>a</p>")], hold=True)
        reading = asyncio.create_task(heard(runs.begin(NEW, "me", answer())))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(runs.close)
        events = await asyncio.wait_for(reading, 5)
        assert [one.get("finish") for one in events] == [None, "interrupted"]
        assert answer.closed

    Runs().close()  # none was ever asked for
    asyncio.run(check())
