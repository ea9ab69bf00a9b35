"""Random model directories beside transformers: equal logits, or refused here.

A tiny Llama's config.json and tensors are changed at random (:mod:`tests.fuzz.model_cases`). What
transformers refuses or completes with random weights has no right answer: here it has to be refused
too where weights are missing, and is counted where only transformers refuses.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import Tally, budget
from tests.fuzz.model_cases import write

REPO = Path(__file__).resolve().parents[2]
_LIMIT = 1e-4  # of the largest logit, or of 1
_PACKED_EVERY = 3
_ASKED_EVERY = 5  # of what is refused here, to see how much transformers takes


class Peer:
    """transformers in a process of its own environment, for many cases."""

    def __init__(self) -> None:
        python = os.environ.get("PEERS_PYTHON", str(REPO / ".venv-peers" / "bin" / "python"))
        kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
        self._process = subprocess.Popen(
            [str(Path(python).absolute()), "-m", "tests.fuzz.models_peer"],
            cwd=REPO,
            env=kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def answer(self, directory: Path, ids: list[int]) -> dict[str, Any]:
        """Return what it makes of a case."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"directory": str(directory), "ids": ids}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer ended; is its environment complete?")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def ours(directory: Path, ids: list[int], packed: bool) -> np.ndarray:
    """Return logits of a row, by whole rows or by the steps that generate."""
    import paddle

    from llm.engine.batch import Batch
    from llm.engine.runners import DygraphRunner
    from llm.llama.build import load_model
    from llm.llama.fused import pack_where_possible

    model = load_model(directory, to_pack=packed)
    model.eval()
    if not packed or model.config.rope_scaling.rope_type == "dynamic":
        with paddle.no_grad():
            return np.asarray(model(paddle.to_tensor([ids])).numpy()[0])
    pack_where_possible(model)
    count = len(ids)
    runner = DygraphRunner(model, block_size=4, max_model_len=count)
    runner.allocate(-(-count // 4))
    places = np.arange(count, dtype=np.int32)
    table = np.arange(-(-count // 4), dtype=np.int32)[None]
    step = (np.asarray(ids, np.int64), np.zeros(count, np.int32), places, table)
    return runner.run(Batch(*step, places.astype(np.int64)))


def compare(mine: np.ndarray, theirs: dict[str, Any]) -> str | None:
    """Say how two answers differ; None where they are equal."""
    other = np.asarray(theirs["logits"], np.float32)
    if mine.shape != other.shape:
        return f"logits of {mine.shape}, transformers' of {other.shape}"
    finite = np.isfinite(other)
    if (np.isfinite(mine) != finite).any():
        return f"{int(finite.sum())} finite logits of transformers, {int(np.isfinite(mine).sum())}"
    error = float(np.abs(mine - other)[finite].max(initial=0))
    size = float(np.abs(other)[finite].max(initial=1))
    return f"logits differ by {error:.2g} of {size:.2g}" if error > _LIMIT * max(1, size) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def try_case(seed: int, root: Path, peer: Peer, tally: Tally) -> None:
    """Write a directory, open it on both sides, and count what came of it."""
    from common.errors import UserError

    directory = root / str(seed)
    ids = write(seed, directory)
    try:
        mine = ours(directory, ids, packed=seed % _PACKED_EVERY == 0)
    except UserError as error:
        assert str(error), "a refusal says why"
        if seed % _ASKED_EVERY:
            tally.count("refused")
            return
        mine = None
    theirs = peer.answer(directory, ids)
    if mine is None:
        tally.count("refused here alone" if "logits" in theirs else "refused by both")
    elif "refused" in theirs:
        tally.count("refused by transformers alone")
        if os.environ.get("FUZZ_SHOW"):
            print(f"  {seed}: {theirs['refused'][:200]}")
    elif "incomplete" in theirs:
        tally.differ(seed, f"opened, though transformers lacks {theirs['incomplete'][:3]}")
    elif problem := compare(mine, theirs):
        tally.differ(seed, problem)
    else:
        tally.count("equal")


def main(argv: Sequence[str]) -> int:
    """Try cases within the budget; 1 where any differs without a word."""
    sys.path.insert(0, str(REPO))
    given = budget(argv, (__doc__ or "").splitlines()[0])
    from llm import runtime

    runtime.prepare(1, "cpu")
    runtime.load_paddle("cpu")
    tally, peer = Tally("models"), Peer()
    with tempfile.TemporaryDirectory(prefix="fuzz-models-") as root, _quiet():
        for seed in given.seeds():
            try:
                try_case(seed, Path(root), peer, tally)
            except Exception as error:  # noqa: BLE001 - a crash is no refusal
                tally.differ(seed, f"{type(error).__name__}: {error}"[:300])
            shutil.rmtree(Path(root) / str(seed), ignore_errors=True)
    peer.close()
    return tally.report()
