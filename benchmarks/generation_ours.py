"""This suite for bench_generation.py and bench_engine.py: packed networks, programs, the engine.

    python benchmarks/generation_ours.py FORM KIND DIRECTORY THREADS [STEP_TOKENS]

FORM is dygraph (packed at the start), mapped (from kept weights, mapped), program (exported), or
engine and engine-off: the scheduler over a mapped network, with its prefix cache and without.
"""

import sys
from pathlib import Path
from typing import Any

import generation_models as shared
from bounds import load_paddle
from interleave import Run, serve

# The quantized files of llama.cpp and OpenVINO have a quantized output matrix too.
_HEAD = {"head_type": "int8"}


def open_network(directory: Path, kind: str) -> Any:
    """Return a packed network."""
    from llm.llama.build import load_model
    from llm.llama.fused import pack

    if kind == "bfloat16":
        return pack(load_model(directory / "hf", dtype="bfloat16", to_pack=True))
    return pack(load_model(directory / kind, to_pack=True), **_HEAD)


def map_network(directory: Path, kind: str) -> Any:
    """Return a network whose packed weights are a mapped file, which is made the first time."""
    from llm.llama.packed_cache import load_packed

    place, packing = (directory / "hf", {}) if kind == "bfloat16" else (directory / kind, _HEAD)
    for _ in range(2):  # packs and keeps, then maps; or maps twice, which takes no time
        network = load_packed(
            place, dtype="bfloat16" if not packing else "float32", packing=packing
        )
    return network


def open_runner(directory: Path, form: str, kind: str, threads: int) -> Any:
    """Return a runner; a program is exported the first time."""
    from llm.engine.runners import DygraphRunner, PredictorRunner
    from llm.llama.export import export_program

    if form != "program":
        opened = open_network if form == "dygraph" else map_network
        return DygraphRunner(opened(directory, kind))
    place = directory / f"program-{kind}"
    if not place.is_dir():
        network = open_network(directory, kind)
        export_program(network, place / "llama", model_name="random", block_size=16)
    return PredictorRunner(place, "llama", device="cpu", threads=threads)


class Cases:
    """What a worker runs, on a runner."""

    def __init__(self, runner: Any, logits_file: Path) -> None:
        import numpy as np

        from llm.engine.batch import Batch

        self.np, self.batch, self.runner = np, Batch, runner
        self.logits_file = logits_file
        self.ids = shared.prompt(runner.vocab_size)
        self.width = 0

    def _allocate(self, sequences: int, tokens: int) -> None:
        self.width = -(-tokens // self.runner.block_size)
        self.runner.allocate(self.width * sequences)

    def _run(self, ids: Any, sequence: Any, position: Any, rows: Any) -> Any:
        np, size = self.np, int(max(sequence)) + 1
        used = int(max(position)) // self.runner.block_size + 1
        table = np.arange(size * self.width, dtype=np.int32).reshape(size, self.width)
        return self.runner.run(
            self.batch(
                np.asarray(ids, np.int64),
                np.asarray(sequence, np.int32),
                np.asarray(position, np.int32),
                np.ascontiguousarray(table[:, :used]),
                np.asarray(rows, np.int64),
            )
        )

    def prompt(self, length: int, sequence: int, rows: Any) -> Any:
        """Compute the prompt of a sequence; return the logits of some rows."""
        np = self.np
        return self._run(self.ids[:length], np.full(length, sequence), np.arange(length), rows)

    def decode(self, batch: int) -> Run:
        """Return what generates for so many sequences, and goes on where it was."""
        np = self.np
        self._allocate(batch, shared.CONTEXT + shared.STEPS * (shared.TURNS + 1))
        for sequence in range(batch):
            self.prompt(shared.CONTEXT, sequence, [0])
        ids, position = self.ids[:batch], np.full(batch, shared.CONTEXT)

        def run() -> None:
            nonlocal ids, position
            for _ in range(shared.STEPS):
                ids = self._run(ids, np.arange(batch), position, np.arange(batch)).argmax(-1)
                position = position + 1

        return run

    def check(self) -> None:
        """Write the logits of the last rows of the prompt."""
        rows = self.np.arange(shared.PROMPT - shared.CHECKED, shared.PROMPT)
        self.np.save(self.logits_file, self.prompt(shared.PROMPT, 0, rows))

    def read_bytes(self) -> int:
        """Return the bytes of weights that a step reads: all but the embedding, as they lie."""
        network = self.runner.model
        tensors = [*network.buffers(), *network.parameters()]
        every = sum(tensor.numel().item() * tensor.element_size() for tensor in tensors)
        table = network.model.embed_tokens.weight
        return every - table.numel().item() * table.element_size()

    def make(self, case: str) -> Run:
        """Return what a case runs."""
        if case == "bytes":
            return self.read_bytes
        if case == "check":
            self._allocate(1, shared.PROMPT)
            return self.check
        name, number = case.split()
        if name == "decode":
            return self.decode(int(number))
        length = int(number)
        self._allocate(1, length)
        return lambda: self.prompt(length, 0, [length - 1])


class Engine:
    """The engine over a runner, see ``generation_engines.Stepped``."""

    def __init__(self, runner: Any, step_tokens: int, prefix_cache: bool) -> None:
        self._runner, self.vocabulary = runner, runner.vocab_size
        self._how = {"max_step_tokens": step_tokens, "prefix_cache": prefix_cache}
        self._count, self._running = 0, dict[int, Any]()
        self._engine: Any = None

    def add(self, ids: list[int], new: int) -> int:
        """Queue a request."""
        from llm.engine.request import Request, SamplingParams

        self._count += 1
        how = SamplingParams(new, temperature=0, ignore_eos=True)
        self._running[self._count] = self._engine.add(Request(ids, how))
        return self._count

    def step(self) -> dict[int, int]:
        """Run a step."""
        self._engine.step()
        counts = {}
        for key, sequence in list(self._running.items()):
            if sequence.produced:
                counts[key] = len(sequence.produced)
                if sequence.produced[-1].finish_reason:
                    del self._running[key]
                sequence.produced.clear()
        return counts

    def clear(self, sequences: int, tokens: int) -> None:
        """Drop all requests."""
        from llm.engine.engine import Engine as Scheduled

        self._running.clear()
        self._engine = Scheduled(
            self._runner, max_sequences=sequences, max_tokens=tokens, **self._how
        )

    def write_logprobs(self, file: Path) -> None:
        """Write the logits of the prompt's last tokens."""
        Cases(self._runner, file).make("check")()


def main(form: str, kind: str, place: str, threads: str, *step_tokens: str) -> None:
    """Serve one form of the model."""
    load_paddle(int(threads))
    directory = Path(place)
    runner = open_runner(directory, form, kind, int(threads))
    file = directory / f"{form}-{kind}.npy"
    if step_tokens:
        import generation_engines

        engine = Engine(runner, int(step_tokens[0]), form == "engine")
        serve(generation_engines.Cases(engine, file).make)
    else:
        serve(Cases(runner, file).make)


if __name__ == "__main__":
    main(*sys.argv[1:])
