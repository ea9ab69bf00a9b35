"""How a program ends: by itself, by bad input, by a signal or because nobody reads its output.

A program imports this before anything else, and from then on Ctrl-C is one line: the imports that
follow may take seconds, and have begun nothing that would have to be concluded. Where a library
imports it, importing it has no effect.
"""

import _signal  # built in; `signal` makes enumerations of it first, and Ctrl-C may come meanwhile
import os
import sys


def end_at_once(number: int, _: object = None) -> None:
    """End this process as shells expect of a signal, after one line if it was Ctrl-C."""
    if number == _signal.SIGINT:
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _imported_by_the_program() -> bool:
    frame = sys._getframe(1).f_back
    while frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "__main__"


if _imported_by_the_program() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, end_at_once)

# Ctrl-C is one line from here on; what follows takes most of the time.
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subprocess import CompletedProcess

# Those that ask a process to end; what was begun is concluded on the way out.
_ASKS = ("SIGTERM", "SIGHUP")
_PR_SET_PDEATHSIG = 1
_MOMENT_S = 0.01
_SIGACTION_BYTES = 1024  # more than any system's struct
# The variable by which a process tells the Python that it runs whom to end with.
_STARTED_BY = "LLAMA_CHECK_STARTED_BY"
# Handlers of signals that nobody has decided on yet.
_AS_STARTED = (signal.SIG_DFL, signal.default_int_handler, end_at_once)


def shell_status(number: int) -> int:
    """What a shell says of a process that a signal ended."""
    return 128 + number


@contextlib.contextmanager
def asked_to_end() -> Iterator[None]:
    """Within this, a signal that asks to end raises `SystemExit` with the status shells expect.

    Ctrl-C raises `KeyboardInterrupt`. What is ignored stays so, as nohup wants. The second of a
    kind ends the process at once. So does the first in the middle of an import, which makes errors
    of its own of exceptions, and, but for Ctrl-C, in processes that work together, which may wait
    for each other. What a library makes of the exception elsewhere (an error of a lock that it did
    not take, one of its own with the same name) becomes the exception again, and where Python
    ignores it (in what runs at a fork, or when an object goes) it is raised a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    asked = _Asked(before, sys.unraisablehook)
    alone = os.environ.get("PADDLE_TRAINERS_NUM", "1") == "1"
    for name in (*(_ASKS if alone else ()), "SIGINT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in _AS_STARTED:
            before[number] = signal.signal(number, asked.hear)
    sys.unraisablehook = asked.ignored
    try:
        yield
    except BaseException as error:
        if asked.number is not None:
            raise exception(asked.number) from error
        raise
    finally:
        sys.unraisablehook = asked.hook
        for number, handler in before.items():
            signal.signal(number, handler)


class _Asked:
    """The signal that asked a process to end, and the exception that it became.

    Args:
        before: handlers to put back in the end.
        hook: what is told of exceptions that Python ignores.
    """

    def __init__(self, before: dict[int, Any], hook: Callable[[Any], object]) -> None:
        self.number: int | None = None
        self.before, self.hook = before, hook
        self._raised: BaseException | None = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        if _imports(frame):
            end_at_once(number)
        signal.signal(number, signal.SIG_DFL)
        self.number, self._raised = number, exception(number)
        raise self._raised

    def ignored(self, found: Any) -> None:
        number = self.number
        if number is None or found.exc_value is not self._raised:
            self.hook(found)
            return
        # Not here, where it would be ignored too.
        again = signal.signal(signal.SIGALRM, lambda _, frame: self.hear(number, frame))
        self.before.setdefault(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, _MOMENT_S)


def exception(number: int) -> BaseException:
    """What a signal that asks to end becomes in Python."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(shell_status(number))


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def handler_kept(number: int = signal.SIGTERM) -> Iterator[None]:
    """Within this, a library may install a signal's handler; afterwards the one before is back.

    A library in C puts its own beneath Python's, which goes on naming the one that nobody calls any
    more. Whatever thread the library runs in, other threads may hear its handler only meanwhile.
    """
    import ctypes

    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(_SIGACTION_BYTES)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    libc.sigaction(number, None, before)
    try:
        yield
    finally:
        libc.sigaction(number, before, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_with_parent(parent: int) -> None:
    """Let this process be killed when the one that started it ends, however that is.

    Args:
        parent: the id of that one, known from before this one began.
    """
    import ctypes

    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # another system than Linux
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Within this, Ctrl-C is not heard by the processes that start, ever; by this one, after it.

    Their interpreters would print a stack of it before a line of ours runs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ending_workers() -> Iterator[None]:
    """Within this, a signal that asks to end kills the workers that were started: none waits.

    Not for a pool: Python waits for ever for a killed worker to take a large piece, or to send the
    rest of a result. A pool is given pieces that take no time instead.
    """
    import multiprocessing

    before = set(multiprocessing.active_children())
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        raise


def work_for_parent(parent: int) -> None:
    """Begin as one of several workers: Ctrl-C is for the parent, whose end is this one's too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)


def run_check(
    words: Sequence[str], settings: Mapping[str, str] | None = None, **options: Any
) -> "CompletedProcess[str]":
    """Run Python in a process that ends with this one; see `subprocess.run` for the options.

    Args:
        words: what follows the interpreter. It calls `run_script` or `heed_starter`.
        settings: environment variables beside this process's.
    """
    import subprocess

    env = {**os.environ, **(settings or {}), _STARTED_BY: str(os.getpid())}
    return subprocess.run([sys.executable, *words], env=env, text=True, check=False, **options)


def heed_starter() -> None:
    """End with the process that began this one by `run_check`; has no effect in others."""
    starter = os.environ.pop(_STARTED_BY, None)
    if starter is not None:
        end_with_parent(int(starter))


def show_what_is_lacking() -> None:
    """Let standard output replace what the terminal's encoding lacks, and never fail for it."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="replace")


def drop_output() -> None:
    """Send the rest of standard output nowhere, so that closing it cannot fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; bad input becomes one message on stderr and exit status 2.

    So does a path that the system refuses: without permission, a name too long, a full disk.

    A signal, or an output that nobody reads, ends it with the status shells expect and no
    traceback, after what was begun has been concluded.
    """
    from common.errors import UserError, said_of_a_path

    heed_starter()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # who started this may not hear it
    show_what_is_lacking()
    try:
        with asked_to_end():
            main()
            sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(shell_status(signal.SIGINT)) from None
    except BrokenPipeError:
        drop_output()
        raise SystemExit(shell_status(13)) from None  # SIGPIPE
    except OSError as error:  # anything else is a fault of this program, and shows where it is
        if (said := said_of_a_path(error)) is None:
            raise
        sys.stderr.write(f"error: {said}\n")
        raise SystemExit(2) from None
