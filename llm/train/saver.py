"""Saves that all processes of a job make together, each its files, at once or in the background.

Rank 0 makes a hidden directory that all fill; when all are through, it seals and renames it. What
any process meets becomes the same error in all of them, and nothing half-written stays. Needs no
paddle, like :mod:`llm.train.checkpoints`.
"""

import shutil
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from os import getpid
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from common.files import Work
from llm.train import checkpoints
from llm.train.logs import logger

_POLL_SECONDS = 0.02
_LAST_WAIT_SECONDS = 60.0  # for other processes, when this one ends with an error
_ELSEWHERE = "another process failed"


class Team(Protocol):
    """The processes of a job."""

    @property
    def rank(self) -> int:
        """The number of this process."""

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the items of all processes, by rank; none goes on before all have come."""


class Alone:
    """A job of one process."""

    rank = 0

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the item."""
        return [item]


Fill = Callable[[Path, Work], None]


class Saver:
    """Writes a run's checkpoints and its final model. All processes call the same methods.

    Args:
        output_dir: of the run; on several hosts, a directory that all of them see.
        team: the processes of the job.
        limit: checkpoints to keep; the newest complete one always stays.
        in_background: a thread of each process writes while training goes on.
    """

    def __init__(
        self,
        output_dir: Path,
        team: Team | None = None,
        *,
        limit: int | None = None,
        in_background: bool = False,
    ) -> None:
        self.output_dir = output_dir
        self.team: Team = team or Alone()
        self.main = self.team.rank == 0
        self._hosts = self.team.gather_objects(socket.gethostname())
        self.limit, self.in_background = limit, in_background
        self._running: _Background | None = None

    def save(self, step: int, fill: Fill, keep: Path | None = None) -> None:
        """Write the checkpoint after ``step`` updates.

        Args:
            step: names it.
            fill: is given a directory, and work that does what touches the disk; what it hands to
                that work may not change afterwards.
            keep: a checkpoint that stays whatever the limit.

        Raises:
            UserError: a full or unwritable disk of any process, now or in the save before.
        """
        self.wait()
        name = checkpoints.checkpoint_path(self.output_dir, step).name
        work = Work(later=self.in_background)
        directory = self._open(name, partial(self._lost, step))
        try:
            work.do(partial(_check_shared, directory))
            fill(directory, work)
            finish = partial(self._seal, directory, step, keep)
            if self.in_background:
                self._running = _Background(directory, step, work, finish)
                self._running.start(self.team.rank, len(self._hosts))
                return
            self._finish(work, finish, partial(self._lost, step))
        finally:
            if self.main and self._running is None:
                shutil.rmtree(directory, ignore_errors=True)

    def final(self, fill: Fill) -> None:
        """Write a model into the output directory itself; see :meth:`save`.

        Raises:
            UserError: a full or unwritable disk of any process; the checkpoints are untouched.
        """
        self.wait()
        work = Work()
        directory = self._open("final", self._not_final)
        try:
            work.do(partial(_check_shared, directory))
            fill(directory, work)
            move = partial(checkpoints.move_final, directory, self.output_dir)
            self._finish(work, move, self._not_final)
        finally:
            if self.main:
                shutil.rmtree(directory, ignore_errors=True)

    def check(self) -> None:
        """Look after a save in the background; called after every step.

        Raises:
            UserError: it failed in some process.
        """
        running = self._running
        if running is None:
            return
        states = self.team.gather_objects(running.state)
        failures = {rank: state for rank, state in enumerate(states) if state}
        if not failures and None in states:
            return
        running.stop()
        self._running = None
        if failures:
            self.team.gather_objects(None)  # no thread writes any more
            if self.main:
                shutil.rmtree(running.directory, ignore_errors=True)
            # Rank 0, which waits for the others, may only know that there was a failure.
            known = {r: text for r, text in failures.items() if text != _ELSEWHERE} or failures
            raise UserError(self._lost(running.step, self._named(*next(iter(known.items())))))

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            UserError: it failed in some process.
        """
        while self._running is not None:
            self._running.join(5 * _POLL_SECONDS)
            self.check()

    def close(self) -> None:
        """Let a save in the background come to its end, though this process may have failed."""
        if self._running is not None:
            self._running.join(_LAST_WAIT_SECONDS)
            self._running.stop()
            if self.main:  # gone where the save succeeded
                shutil.rmtree(self._running.directory, ignore_errors=True)
            self._running = None

    def _open(self, name: str, message: Callable[[str], str]) -> Path:
        """Make a hidden directory, known to all processes and to no earlier job."""
        number = self.team.gather_objects(getpid())[0]
        directory = self.output_dir / f".{name}.{number}.tmp"
        work = Work()
        if self.main:
            work.do(partial(directory.mkdir, parents=True))
        self._agree(work, message)
        return directory

    def _finish(
        self, work: Work, finish: Callable[[], None], message: Callable[[str], str]
    ) -> None:
        self._agree(work, message)
        if self.main:
            work.conclude()
            work.do(finish)
        self._agree(work, message)

    def _agree(self, work: Work, message: Callable[[str], str]) -> None:
        errors = self.team.gather_objects(None if work.error is None else str(work.error))
        for rank, error in enumerate(errors):
            if error is not None:
                raise UserError(message(self._named(rank, error))) from work.error

    def _named(self, rank: int, error: str) -> str:
        return error if len(self._hosts) == 1 else f"rank {rank} on {self._hosts[rank]}: {error}"

    def _seal(self, directory: Path, step: int, keep: Path | None) -> None:
        checkpoints.seal(directory, step)
        path = checkpoints.checkpoint_path(self.output_dir, step)
        checkpoints.put_in_place(directory, path)
        logger.info("saved %s", path)
        try:
            for old in checkpoints.rotate(self.output_dir, self.limit, keep=keep):
                logger.info("deleted %s (save_total_limit)", old)
        except OSError as error:
            logger.warning("save_total_limit: cannot delete an old checkpoint: %s", error)

    def _lost(self, step: int, error: str) -> str:
        newest = checkpoints.find_checkpoints(self.output_dir)[0]
        kept = f"the last complete one is {newest[-1].path}" if newest else "there is none yet"
        return (
            f"step {step}: cannot write the checkpoint to {self.output_dir}: {error}; {kept}. Free "
            "some space or lower --save_total_limit, then --resume_from_checkpoint true"
        )

    def _not_final(self, error: str) -> str:
        return (
            f"cannot write the final model to {self.output_dir}: {error}; the checkpoints are "
            "intact, free some space and run again with --resume_from_checkpoint true"
        )


class _Background:
    """One save by threads. They never talk to each other but through files in its directory.

    Attributes:
        state: None while this process writes, empty when it is done, else why it failed.
    """

    def __init__(self, directory: Path, step: int, work: Work, finish: Callable[[], None]) -> None:
        self.directory, self.step = directory, step
        self.state: str | None = None
        self._work, self._finish = work, finish
        self._give_up = threading.Event()
        # Not Thread.join: where Ctrl-C comes in the middle of it, Python 3.11 takes the thread for
        # one that has ended.
        self._ended = threading.Event()

    def start(self, rank: int, size: int) -> None:
        """Begin to write, as one of so many processes."""
        # A daemon: a process that has to end does not wait for files of one that has died.
        threading.Thread(
            target=self._run, args=(rank, size), name="checkpoint", daemon=True
        ).start()

    def join(self, seconds: float) -> None:
        """Wait for this process's part, but no longer than that."""
        self._ended.wait(seconds)

    def stop(self) -> None:
        """Wait for this process's part, but not for that of others."""
        self._give_up.set()
        self._ended.wait()

    def _run(self, rank: int, size: int) -> None:
        try:
            self._write(rank, size)
        finally:
            if self.state is None:  # a fault of ours: its traceback stands above
                self.state = "the thread that writes it has died"
            self._ended.set()

    def _write(self, rank: int, size: int) -> None:
        self._work.run()
        failed = self._work.error
        if failed is not None:
            self.state = str(failed)  # before the file that makes rank 0 look
        (self.directory / f"{'done' if failed is None else 'failed'}.{rank}").touch()
        if failed is None and rank == 0:
            if not self._others(size):
                self.state = _ELSEWHERE
                return
            self._work.conclude()
            self._work.do(self._finish)
            failed = self._work.error
        self.state = "" if failed is None else str(failed)

    def _others(self, size: int) -> bool:
        """Wait for the files that tell of the others; return whether all succeeded."""
        done = [self.directory / f"done.{rank}" for rank in range(size)]
        while not all(file.exists() for file in done):
            if self._give_up.is_set() or any(self.directory.glob("failed.*")):
                return False
            time.sleep(_POLL_SECONDS)
        for file in done:
            file.unlink()
        return True


def _check_shared(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(
            f"{directory}, which rank 0 made, is not there: put output_dir on a file system that "
            "all hosts share"
        )
