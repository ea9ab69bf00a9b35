"""Processes that do little but save, killed one after another; run as a program.

    python -m tests.distributed.killed_ranks DIRECTORY MOMENTS

Four ranks (two stages, two copies) write checkpoint after checkpoint through the real saver; what a
checkpoint holds follows from its step. Again and again one rank gets SIGKILL at a random moment,
and the next run goes on from what is there. Without paddle, so that ranks are cheap forks.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from common.files import Work
from llm.llama.files.parts import Part, PartFiles
from llm.parallel.layout import Layout
from llm.parallel.topology import Topology
from llm.train import checkpoints
from llm.train.saver import Saver

LAYOUT = Layout(pipeline=2, data=2)
LIMIT = 2
NAMES = {stage: [f"layers.{stage}.{index}" for index in range(6)] for stage in range(2)}


def content(name: str, step: int) -> np.ndarray:
    """What a tensor holds after so many updates; 100 kB, so that writing takes a while."""
    return np.full([25_000], step, np.float32) + NAMES[int(name.split(".")[1])].index(name)


@dataclass(frozen=True)
class Piped(Topology):
    """Ranks that talk through pipes to rank 0; one that has lost the others ends."""

    pipes: list[Any] = field(default_factory=list)

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the items of all ranks."""
        try:
            if self.rank != 0:
                self.pipes[0].send(item)
                return self.pipes[0].recv()
            items = [item, *(pipe.recv() for pipe in self.pipes)]
            for pipe in self.pipes:
                pipe.send(items)
        except (EOFError, OSError):
            os._exit(1)
        return items


def fill(team: Piped, step: int, directory: Path, work: Work) -> None:
    """Write what a checkpoint holds."""
    for stem in ("model", "optimizer"):

        def part(name: str, stem: str = stem) -> Part:
            value = content(name, step)
            fetch = lambda writer: value if writer == team.rank else None  # noqa: E731
            return Part(f"{stem}.{name}", value.shape, "F32", fetch)

        files = PartFiles(directory, stem, team, work, 200_000)
        files.write([part(name) for name in NAMES[team.at.pipeline]])
        work.last(files.take_names)
    own = directory / f"random_state-{team.rank:05}.json"
    work.do(partial(checkpoints.write_json, own, {"step": step}))


def train(team: Piped, output: Path, first: int, in_background: bool) -> None:
    """Save without end."""
    saver = Saver(output, team, limit=LIMIT, in_background=in_background)
    step = first
    while True:
        step += 1
        time.sleep(0.002)
        team.gather_objects(step)
        saver.check()
        saver.save(step, partial(fill, team, step))


def start(output: Path, first: int, in_background: bool) -> list[int]:
    """Fork the ranks; return their process ids."""
    ends = [Pipe() for _ in range(LAYOUT.world_size - 1)]
    children = []
    for rank in range(LAYOUT.world_size):
        child = os.fork()
        if child == 0:
            own = [hub for hub, _ in ends] if rank == 0 else [ends[rank - 1][1]]
            for pair in ends:
                for end in pair:
                    if not any(end is kept for kept in own):
                        end.close()
            train(Piped(LAYOUT, rank, pipes=own), output, first, in_background)
        children.append(child)
    for pair in ends:
        for end in pair:
            end.close()
    return children


def verify(checkpoint: checkpoints.Checkpoint) -> None:
    """Compare a complete checkpoint with what its step says, by another reader."""
    wanted = {
        f"{stem}.{name}": content(name, checkpoint.step)
        for stem in ("model", "optimizer")
        for names in NAMES.values()
        for name in names
    }
    found: dict[str, np.ndarray] = {}
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() == wanted.keys(), sorted(wanted.keys() ^ found.keys())
    for name, value in wanted.items():
        assert np.array_equal(found[name], value), (checkpoint, name)
    states = sorted(path.name for path in checkpoint.path.glob("random_state-*.json"))
    assert len(states) == LAYOUT.world_size, states
    assert not list(checkpoint.path.glob(".*")), "what a save needs on its way stays behind"


def main(output: Path, moments: int) -> None:
    """Kill, look, go on."""
    draw = random.Random(11)
    report: dict[str, Any] = {"resumed": [], "interrupted": 0, "victims": [], "progress": [0, 0]}
    step = 0
    for moment in range(moments):
        in_background = moment % 2 == 1
        children = start(output, step, in_background)
        while step == 0 and not (output / "checkpoint-1").is_dir():
            time.sleep(0.005)
        time.sleep(draw.uniform(0.02, 0.6))
        victim = draw.randrange(len(children))
        os.kill(children[victim], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes[victim] == -signal.SIGKILL and all(codes), codes
        newest, messages = checkpoints.find_resume(output, "true")
        assert messages == [] and newest is not None and newest.step >= step, (newest, step)
        complete, _ = checkpoints.find_checkpoints(output)
        for checkpoint in complete:
            verify(checkpoint)
        report["progress"][in_background] += newest.step > step
        report["interrupted"] += bool(checkpoints.sweep(output))
        assert [p for p in output.iterdir() if p.name.startswith(".")] == []
        step = newest.step
        report["resumed"].append(step)
        report["victims"].append(victim)
    print(json.dumps(report))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
