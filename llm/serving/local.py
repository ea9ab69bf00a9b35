"""Routes and engine in one process, where there is no server: files of requests, and tests."""

import queue
from collections.abc import Callable
from typing import Any

from data.tokenizer import Tokenizer
from llm.serving.loop import EngineWorker
from llm.serving.steps import EngineSteps, Loaded

Messages = queue.SimpleQueue[tuple[Any, ...] | None]


class QueueLink:
    """An end of a link within a process; see :class:`llm.serving.link.Link`."""

    def __init__(self, sent: Messages, received: Messages) -> None:
        self._sent, self._received = sent, received

    def send(self, *message: Any) -> None:
        """See ``Link``."""
        self._sent.put(message)

    def receive(self, timeout: float | None = None) -> tuple[Any, ...] | None:
        """See ``Link``."""
        try:
            message = self._received.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is None:
            raise EOFError
        return message

    def close(self) -> None:
        """See ``Link``."""
        self._sent.put(None)


class LocalWorker(EngineWorker):
    """A worker whose engine's side is in this process, too.

    Args:
        load: opens the model; runs on the engine's thread.
        max_queue: requests that may wait beside those that the engine runs together.
        tokenizer: the model's.
        max_queue_delay: see :class:`llm.serving.steps.EngineSteps`.
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        max_queue: int,
        tokenizer: Tokenizer,
        *,
        max_queue_delay: float = 0.0,
    ) -> None:
        there, back = Messages(), Messages()
        super().__init__(QueueLink(there, back), max_queue, tokenizer)
        self.steps = EngineSteps(load, QueueLink(back, there), max_queue_delay=max_queue_delay)

    def start(self) -> None:
        """Begin to load; returns at once."""
        super().start()
        self.steps.start()

    def wait_loaded(self, timeout: float | None = None) -> bool:
        """Wait for the model; False when ``timeout`` seconds passed before.

        Raises:
            Exception: whatever loading raised.
        """
        return self.steps.wait_loaded(timeout) and super().wait_loaded(timeout)

    def close(self) -> None:
        """End all answers, and both sides."""
        super().close()
        self.steps.close()
