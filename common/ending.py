"""How a script ends: by itself, by bad input, by a signal or because nobody reads its output."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Those that ask a process to end; what was begun is concluded on the way out.
_ASKS = ("SIGTERM", "SIGHUP")


def shell_status(number: int) -> int:
    """What a shell says of a process that a signal ended."""
    return 128 + number


@contextlib.contextmanager
def asked_to_end() -> Iterator[None]:
    """Within this, a signal that asks to end raises `SystemExit` with the status shells expect.

    What is ignored stays so, as nohup wants. The second of a kind ends the process at once, and so
    does the first in processes that work together, which may wait for each other.
    """
    before: dict[int, Any] = {}
    alone = os.environ.get("PADDLE_TRAINERS_NUM", "1") == "1"
    if alone and threading.current_thread() is threading.main_thread():
        for name in _ASKS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(shell_status(number))


def take_back_signals() -> None:
    """Install Python's handlers again, after a library has put its own beneath them."""
    if threading.current_thread() is threading.main_thread():
        for name in (*_ASKS, "SIGINT"):
            number = getattr(signal, name, None)
            handler = None if number is None else signal.getsignal(number)
            if number is not None and handler is not None:
                signal.signal(number, handler)


def show_what_is_lacking() -> None:
    """Let standard output replace what the terminal's encoding lacks, and never fail for it."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="replace")


def drop_output() -> None:
    """Send the rest of standard output nowhere, so that closing it cannot fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
