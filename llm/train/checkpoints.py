"""Checkpoint directories that are either complete or ignored, and where a run goes on from one.

A checkpoint is written into a hidden directory beside its place, synced, marked with the size of
every file, and renamed. A process killed at any moment therefore leaves the earlier checkpoints
untouched and at worst a hidden directory that the next run reports and removes. Nothing here needs
paddle: resuming is decided before that is imported. What the files of a checkpoint hold is the
business of :mod:`llm.train.state`, and who writes when that of :mod:`llm.train.saver`.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import holds_something
from llm.config.training import TrainArguments
from llm.train.logs import logger

MARKER = "complete.json"
RESOLVED_CONFIG = "run_config.yaml"
LOADER_STATE = "loader_state.json"
TRAINER_STATE = "trainer_state.json"  # PaddleNLP's name; its loop reads this file on resume
MERGED = "merged"  # the model with its adapter, as one directory
# What a run writes into output_dir; --overwrite_output_dir removes these and nothing else.
_ARTEFACTS = (
    "checkpoint-*",
    ".checkpoint-*",
    ".final-*",
    "train_log.jsonl",
    "loss_curve.png",
    "*_results.json",
    "model*.safetensors*",
    "adapter_*",
    MERGED,
    "runs",
    RESOLVED_CONFIG,
)
_NAME = re.compile(r"checkpoint-(\d+)")
_PROBES = 8  # samples by which an order is known again


class Samples(Protocol):
    """A map-style dataset; its items are arrays by name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, NDArray[Any]]: ...


@dataclass(frozen=True, order=True)
class Checkpoint:
    """One complete checkpoint; sorts by step."""

    step: int
    path: Path


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` updates lies."""
    return output_dir / f"checkpoint-{step}"


def why_incomplete(path: Path) -> str | None:
    """Return what is wrong with a checkpoint directory, or None when it is complete."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        files = dict(marker["files"])
    except FileNotFoundError:
        return f"it has no {MARKER}: an interrupted save, or not a checkpoint of this suite"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MARKER} cannot be read ({error})"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def find_checkpoints(output_dir: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return the complete checkpoints by rising step, and one message per incomplete one."""
    complete, problems = [], []
    for path in output_dir.glob("checkpoint-*") if output_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        problem = why_incomplete(path)
        if problem is None:
            complete.append(Checkpoint(int(match[1]), path))
        else:
            problems.append(f"ignoring {path}: {problem}")
    return sorted(complete), problems


def sync_file(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_final(temporary: Path, output_dir: Path) -> None:
    """Move the files of a complete model into the output directory, in place of an older one."""
    for pattern in ("model*.safetensors*", "adapter_*"):
        for stale in output_dir.glob(pattern):
            stale.unlink()
    for file in sorted(temporary.iterdir()):
        if file.is_file():
            sync_file(file)
        file.replace(output_dir / file.name)
    sync_file(output_dir)


def seal(directory: Path, step: int) -> None:
    """Write every file to the disk, and then the marker with their sizes."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for file in files:
        sync_file(file)
    sizes = {str(file.relative_to(directory)): file.stat().st_size for file in files}
    marker = directory / MARKER
    marker.write_text(json.dumps({"step": step, "files": sizes}, indent=1), encoding="utf-8")
    sync_file(marker)
    sync_file(directory)


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a sealed directory its name."""
    if final.exists():  # a rename cannot replace a directory that has contents
        discard(final)
    temporary.replace(final)
    sync_file(final.parent)


def discard(path: Path) -> None:
    """Delete a checkpoint so that an interrupted deletion leaves nothing that looks like one."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.replace(hidden)
    shutil.rmtree(hidden)


def rotate(output_dir: Path, limit: int | None, keep: Path | None = None) -> list[Path]:
    """Delete the oldest complete checkpoints beyond ``limit``; the newest and ``keep`` stay.

    Returns:
        what was deleted.
    """
    if limit is None:
        return []
    complete, _ = find_checkpoints(output_dir)
    surplus = [point.path for point in complete[: -max(limit, 1)] if point.path != keep]
    for path in surplus:
        discard(path)
    return surplus


def sweep(output_dir: Path) -> list[str]:
    """Remove hidden directories of interrupted saves; return one message for each."""
    messages = []
    for pattern in (".checkpoint-*", ".final-*"):
        for path in sorted(output_dir.glob(pattern)):
            shutil.rmtree(path, ignore_errors=True)
            messages.append(f"removed {path}, left by an interrupted save")
    return messages


def clear_run(output_dir: Path) -> None:
    """Remove what an earlier run wrote, and nothing else (``--overwrite_output_dir``)."""
    for pattern in _ARTEFACTS:
        for path in output_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def find_resume(output_dir: Path, wanted: str | None) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that ``--resume_from_checkpoint`` names, and messages on ignored ones.

    Args:
        output_dir: where ``true`` looks for the newest complete checkpoint.
        wanted: ``true``, ``false``, a checkpoint directory, or None.

    Raises:
        UserError: there is none, it is incomplete, or newer ones would be left in the way.
    """
    if wanted is None or wanted.lower() in ("false", "0", "no", "off"):
        return None, []
    complete, messages = find_checkpoints(output_dir)
    if wanted.lower() in ("true", "1", "yes", "on"):
        if not complete:
            detail = "".join(f"; {message}" for message in messages)
            restart = "drop the flag to start from scratch"
            if holds_something(output_dir):
                restart = "start over with --overwrite_output_dir true instead of the flag"
            raise UserError(
                f"resume_from_checkpoint: no complete checkpoint in {output_dir}{detail}; {restart}"
            )
        return complete[-1], messages
    path = Path(wanted)
    if not path.is_dir():
        known = ", ".join(str(checkpoint.path) for checkpoint in complete) or "none"
        raise UserError(
            f"resume_from_checkpoint: {path} is not a directory; complete checkpoints in "
            f"{output_dir}: {known}"
        )
    problem = why_incomplete(path)
    if problem is not None:
        raise UserError(f"resume_from_checkpoint: {path} is not complete: {problem}")
    step = int(read_json(path / MARKER)["step"])
    newer = [checkpoint.path for checkpoint in complete if checkpoint.step > step]
    if newer and path.resolve().parent == output_dir.resolve():
        raise UserError(
            f"resume_from_checkpoint: {newer[-1]} is newer than {path}; going back would mix two "
            "runs, so move the newer ones away or choose another --output_dir"
        )
    return Checkpoint(step, path), messages


def write_json(path: Path, content: Any) -> None:
    """Write JSON whose floats read back to the same bits."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a state file of a checkpoint.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} of the checkpoint: {error}") from error


@dataclass(frozen=True)
class Place:
    """Where a run began to count: after ``step`` updates, at sample ``sample``.

    A run that goes on with another global batch takes the next samples, and as many of them with
    every update as the new batch holds.
    """

    step: int = 0
    sample: int = 0

    def sample_at(self, step: int, per_update: int) -> int:
        """Return the samples that were taken when ``step`` updates are done."""
        return self.sample + (step - self.step) * per_update

    def step_at(self, sample: float, per_update: int) -> int:
        """Return the updates after which ``sample`` samples have been taken."""
        return self.step + math.ceil(round((sample - self.sample) / per_update, 6))


def order_fingerprint(dataset: Samples, consumed: int) -> str:
    """Hash up to eight samples spread over the first ``consumed`` ones.

    Two datasets with equal fingerprints have, for all practical purposes, shown a run the same
    samples so far; a changed store, split, seed or length of the run shows here. Of a dataset that
    has a ``first`` sample, only those from there on are looked at.
    """
    digest = hashlib.sha256()
    first = getattr(dataset, "first", 0)
    probes = min(_PROBES, consumed - first)
    for index in np.unique(np.linspace(first, consumed - 1, probes).astype(int)):
        sample = dataset[int(index)]
        for name in sorted(sample):
            if sample[name].dtype.kind == "i":  # ids and labels, not scores of some model
                digest.update(np.ascontiguousarray(sample[name]).tobytes())
    return digest.hexdigest()


class Progress(Protocol):
    """The part of a trainer's state that the best checkpoint is kept in."""

    global_step: int
    max_steps: int
    best_metric: float | None
    best_model_checkpoint: str | None


class Best:
    """Keeps ``best_metric`` and ``best_model_checkpoint`` of the trainer's state, as the Trainers
    of PaddleNLP and Hugging Face do, so that a resumed run knows them.

    Args:
        run: says by which metric; without one, this does nothing.
        output_dir: where the checkpoints lie.
    """

    def __init__(self, run: TrainArguments, output_dir: Path) -> None:
        self.run, self.output_dir = run, output_dir
        self._resumed: Path | None = None

    def resume(self, checkpoint: Path) -> None:
        """Look for checkpoints beside this one too, from which the run goes on."""
        self._resumed = checkpoint.parent

    def update(self, state: Progress, metrics: dict[str, float]) -> None:
        """Compare an evaluation with the best; the earlier of two equal ones stays."""
        step, epoch_ends = state.global_step, frozenset([state.global_step])
        # Evaluations fall on saves, so this step ends an epoch where saves do.
        if self.run.best_by is None or not self.run.saves_at(step, state.max_steps, epoch_ends):
            return
        name, more_is_better = self.run.best_by
        value, best = metrics[f"eval_{name}"], state.best_metric
        if best is None or (value > best if more_is_better else value < best):
            state.best_metric = value
            state.best_model_checkpoint = str(checkpoint_path(self.output_dir, step))
            logger.info("best so far: eval_%s %.6g at step %d", name, value, step)

    def checkpoint(self, state: Progress) -> Path | None:
        """Return the best checkpoint, which rotation keeps; None where there is none yet."""
        if self.run.best_by is None or state.best_model_checkpoint is None:
            return None
        written = Path(state.best_model_checkpoint)
        # Directories may have moved since the state was written, and a run may have gone on in
        # another one than where it was at its best.
        places = [self.output_dir, self._resumed or self.output_dir, written.parent]
        found = (place / written.name for place in places if (place / written.name).is_dir())
        return next(found, self.output_dir / written.name)
