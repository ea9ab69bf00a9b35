"""Commands of `data`, run in the process of the test."""

from collections.abc import Callable, Sequence

from common.ending import run_script


def status(main: Callable[[Sequence[str]], None], words: Sequence[str]) -> object:
    """Run a command's main as its module does; returns the exit status."""
    try:
        run_script(lambda: main(words))
    except SystemExit as stop:
        return stop.code
    return 0
