"""What joins the engine's process with the HTTP process: messages over an inherited socket.

To the engine go ``open``, ``drop``, ``close`` and ``change`` (of adapters); back come ``loaded``,
one ``step`` for all the tokens that a step of the engine made, ``changed`` and ``stop``. Both ends
are ours and the socket has no name, so that messages are pickled.
"""

import contextlib
import multiprocessing
import threading
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from common.errors import UnknownNameError, UserError
from llm.engine.request import BrokenLogitsError, Token
from llm.serving.errors import ApiError


class Link(Protocol):
    """One end. Any thread may send; one receives."""

    def send(self, *message: Any) -> None:
        """Send a message: its name and what belongs to it; lost where the other end is closed."""

    def receive(self, timeout: float | None = None) -> tuple[Any, ...] | None:
        """Wait for a message; None when ``timeout`` seconds pass before.

        Raises:
            EOFError: the other end is closed.
        """

    def close(self) -> None:
        """Give the end up."""


class SocketLink:
    """An end between two processes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # of sending

    def send(self, *message: Any) -> None:
        """See :class:`Link`."""
        # Whoever receives finds out that the other is gone, and says so once.
        with self._lock, contextlib.suppress(OSError):
            self._connection.send(message)

    def receive(self, timeout: float | None = None) -> tuple[Any, ...] | None:
        """See :class:`Link`."""
        try:
            if timeout is not None and not self._connection.poll(timeout):
                return None
            message: tuple[Any, ...] = self._connection.recv()
        except OSError as error:  # reset by the other end, or closed by this process
            raise EOFError from error
        return message

    def close(self) -> None:
        """See :class:`Link`."""
        self._connection.close()


def pair() -> tuple[SocketLink, SocketLink]:
    """Return two ends that are joined; a process forked from this one inherits both."""
    one, other = multiprocessing.Pipe()
    return SocketLink(one), SocketLink(other)


class Failure(NamedTuple):
    """Why an answer ends without its last token."""

    message: str
    status: int
    code: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Describe what the engine raised: 400 or 404 where it refused, 500 where it broke."""
        if isinstance(error, UnknownNameError):
            # It was there when the request was checked, and has been unloaded since.
            return cls(str(error), 404, "model_not_found")
        if isinstance(error, UserError) and not isinstance(error, BrokenLogitsError):
            return cls(str(error), 400, "refused_by_engine")
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return cls(f"the engine failed ({said})", 500, "engine_error")

    def as_error(self) -> ApiError:
        """Return what a route raises."""
        return ApiError(self.message, status=self.status, code=self.code)


class Event(NamedTuple):
    """One token of an answer, or its failure: by the id of its HTTP request, and its number there.

    ``num_cached``: how many tokens of its prompt were in the engine's cache; ``started``: when it
    left the queue, as ``time.monotonic`` says, which is one clock for all processes.
    """

    id: int
    number: int
    num_cached: int
    started: float
    what: Token | Failure
