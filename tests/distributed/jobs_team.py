"""Jobs for test_team.py: ranks that share a model, through the one door, and what befalls them."""

import atexit
import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm.config.generation import OpenArguments
from llm.engine.finding import find_model
from llm.engine.opening import open_model
from llm.engine.request import Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.llama.config import TINY_NAME

AT_STEP = 5
RANK = int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def killed() -> None:
    """End without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def raised() -> None:
    """Fail, as memory may."""
    raise RuntimeError("planted: no memory")


def told_to_stop() -> None:
    """Hear what the launcher sends."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)


MISHAPS = {function.__name__: function for function in (killed, raised, told_to_stop)}


@contextlib.contextmanager
def _exiting() -> Iterator[None]:
    """Do at the end what an interpreter does at its end, which a rank of tests leaves out."""
    atexit._clear()  # what was registered before the fork is not this process's
    try:
        yield
    finally:
        atexit._run_exitfuncs()


def _befall(what: Callable[[], None], through: Path) -> None:
    """Let something happen in the middle of a step; a file tells that the step went on."""
    real, steps = DygraphRunner._logits, iter(range(1000))

    def run(runner: DygraphRunner, batch: Any) -> Any:
        if next(steps) != AT_STEP:
            return real(runner, batch)
        what()
        logits = real(runner, batch)
        through.touch()
        return logits

    DygraphRunner._logits = run  # type: ignore[method-assign]


def answer(mishap: str, rank: int, file: str) -> None:
    """Answer with a model that all ranks share; one of them suffers a mishap."""
    if rank == RANK:
        _befall(MISHAPS[mishap], Path(f"{file}.through"))
    place = OpenArguments(model_name_or_path=TINY_NAME, device="cpu")
    place.validate()
    params = SamplingParams(max_new_tokens=30, temperature=0, ignore_eos=True)
    with _exiting(), Path(file).open("w", encoding="utf-8") as kept:
        model = open_model(place, find_model(place))
        for token in model.open_engine(1, 64).stream(Request([5, 17], params)):
            kept.write(f"{token.token_id}\n")


def script(words: list[str], pids: str) -> None:
    """Run a script; the file of this rank in ``pids`` tells whom to send signals."""
    Path(pids, str(RANK)).write_text(str(os.getpid()), encoding="utf-8")
    sys.argv = words
    with _exiting():
        runpy.run_path(words[0], run_name="__main__")
