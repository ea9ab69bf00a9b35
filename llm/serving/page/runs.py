"""Answers under way, which belong to no connection: a browser may lose its own, load the page anew
or open it in another tab, and goes on where it was."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from llm.serving.page.answers import Event

logger = logging.getLogger(__name__)

# A reload takes a second, a lost network some more; an engine works no longer for a closed tab.
_PATIENCE_SECONDS = 30.0
# What has ended stays for those who come back, unless too many others have ended since.
_KEPT_SECONDS, _KEPT = 600.0, 256
_FIGURES = ("usage", "first", "seconds")  # of an answer so far


@dataclass(eq=False)
class _Reader:
    """How far a browser has heard: characters, tokens, parts of calls, and the first block of HTML
    that it does not know as it is now."""

    text: int = 0
    tokens: int = 0
    calls: int = 0
    blocks: int = 0
    left_out: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Run:
    """One answer, which any number of readers follow from its beginning.

    Args:
        events: the answer's, as :mod:`llm.serving.page.answers` lists them.
        patience: seconds without a reader after which it ends.
    """

    def __init__(self, events: AsyncGenerator[Event], patience: float) -> None:
        self._text = ""
        self._tokens: list[Any] = []
        self._calls: list[Any] = []
        self._blocks: list[str] = []
        self._left_out = 0
        self._figures: Event = dict.fromkeys(_FIGURES)
        self._last: Event | None = None
        self._readers: set[_Reader] = set()
        self._patience = patience
        self._why = "stopped"
        self._task = asyncio.create_task(self._take_in(events))
        self._wait_for_readers()

    @property
    def task(self) -> "asyncio.Task[None]":
        """Is done when the answer has ended, and its connection to the API is closed."""
        return self._task

    def stop(self) -> None:
        """End it at the server, too; its readers hear the end."""
        self._task.cancel()

    async def follow(self) -> AsyncGenerator[Event]:
        """Yield events that come to the whole answer, whenever one begins to read."""
        reader = _Reader()
        self._readers.add(reader)
        self._alone.cancel()
        try:
            while True:
                reader.news.clear()
                for event in self._news(reader):
                    yield event
                if self._last is not None and not reader.news.is_set():
                    yield self._end(reader)
                    return
                await reader.news.wait()
        finally:
            self._readers.discard(reader)
            if not self._readers and self._last is None:
                self._wait_for_readers()

    def _wait_for_readers(self) -> None:
        self._alone = asyncio.get_running_loop().call_later(self._patience, self.give_up)

    def give_up(self) -> None:
        """End it for a reason of the page's own; its readers hear that it was interrupted."""
        self._why = "interrupted"
        self._task.cancel()

    async def _take_in(self, events: AsyncGenerator[Event]) -> None:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self._take(event)
        except asyncio.CancelledError:
            self._last = self._last or {"type": "end", "finish": self._why, **self._figures}
        except Exception:  # whoever follows would wait for ever
            logger.exception("an answer of the chat page failed")
            self._last = {"type": "error", "message": "", "code": "broke_off", "status": 500}
        finally:
            self._alone.cancel()
            self._tell()

    def _take(self, event: Event) -> None:
        if event["type"] == "left_out":
            self._left_out = event["messages"]
        elif event["type"] == "error":
            self._last = event
        else:
            self._blocks[event["from"] :] = event["html"]
            for reader in self._readers:
                reader.blocks = min(reader.blocks, event["from"])
            if event["type"] == "end":
                self._last = event
            else:
                self._text += event["text"]
                self._tokens += event["tokens"]
                self._calls += event["calls"]
                self._figures = {name: event[name] for name in _FIGURES}
        self._tell()

    def _tell(self) -> None:
        for reader in self._readers:
            reader.news.set()

    def _news(self, reader: _Reader) -> list[Event]:
        """Return what a reader has not heard, but for the end."""
        news: list[Event] = []
        if self._left_out > reader.left_out:
            reader.left_out = self._left_out
            news.append({"type": "left_out", "messages": self._left_out})
        told = reader.text, reader.tokens, reader.calls
        known = len(self._text), len(self._tokens), len(self._calls)
        if known != told:
            event = {"type": "text", "text": self._text[reader.text :], **self._html(reader)}
            event |= {
                "tokens": self._tokens[reader.tokens :],
                "calls": self._calls[reader.calls :],
                **self._figures,
            }
            reader.text, reader.tokens, reader.calls = known
            news.append(event)
        return news

    def _end(self, reader: _Reader) -> Event:
        assert self._last is not None
        return self._last if self._last["type"] == "error" else self._last | self._html(reader)

    def _html(self, reader: _Reader) -> Event:
        first, reader.blocks = reader.blocks, len(self._blocks)
        return {"from": first, "html": self._blocks[first:]}


class Runs:
    """The answers under way, and those that have ended lately, by ids that browsers make.

    Args:
        patience: seconds that an answer goes on without a reader.
    """

    def __init__(self, patience: float = _PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._running: dict[tuple[str, str], Run] = {}
        self._ended: dict[tuple[str, str], Run] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, name: str, owner: str, events: AsyncGenerator[Event]) -> Run:
        """Have an answer written.

        Args:
            name: nobody guesses it, and no other answer has it.
            owner: who follows has to be the same: the key to the API.
            events: of the answer.
        """
        self._loop = asyncio.get_running_loop()
        key = name, owner
        run = self._running[key] = Run(events, self._patience)
        run.task.add_done_callback(lambda _: self._keep(key))
        return run

    def find(self, name: str, owner: str) -> Run | None:
        """Return the answer of that name, where it is the owner's and not forgotten."""
        return self._running.get((name, owner)) or self._ended.get((name, owner))

    def close(self) -> None:
        """Interrupt those under way, from any thread: a server waits for those who follow them."""
        if self._loop is not None:
            for run in list(self._running.values()):
                self._loop.call_soon_threadsafe(run.give_up)

    def _keep(self, key: tuple[str, str]) -> None:
        self._ended[key] = self._running.pop(key)
        if len(self._ended) > _KEPT:
            del self._ended[next(iter(self._ended))]
        asyncio.get_running_loop().call_later(_KEPT_SECONDS, self._ended.pop, key, None)
