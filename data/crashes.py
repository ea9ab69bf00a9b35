"""Which item a process died of: libraries in C++ and Rust can end one without an exception."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from common.ending import ending_workers, starting_workers, work_for_parent

Item = TypeVar("Item")


class Crash(NamedTuple):
    """The item, by its number, and how the process ended: "SIGSEGV", or "status 3"."""

    number: int
    how: str


def find_crash(
    work: Callable[[Item], object],
    items: Sequence[Item],
    start: Literal["fork", "spawn"],
) -> Crash | None:
    """Work on items one by one in a process of their own, to learn which one ends it.

    Args:
        work: what was done when a process died.
        items: what it was done to, among other things.
        start: how the process begins; "spawn" pickles `work` and `items`.

    Returns:
        None where all of them pass now, as after a lack of memory.
    """
    context: Any = multiprocessing.get_context(start)
    number = context.Value("q", -1)
    process = context.Process(target=_work, args=(os.getpid(), work, items, number))
    with ending_workers():
        with starting_workers():
            process.start()
        process.join()
    code = process.exitcode or 0
    if code == 0 or number.value < 0:
        return None
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    return Crash(number.value, how)


def _work(parent: int, work: Callable[[Any], object], items: Sequence[Any], number: Any) -> None:
    work_for_parent(parent)
    for index, item in enumerate(items):
        number.value = index
        work(item)
