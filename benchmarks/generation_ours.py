"""This suite's engine for bench_generation.py: a packed network, in dygraph or exported."""

import sys
from pathlib import Path
from typing import Any

import generation_models as shared
from bounds import load_paddle
from interleave import Run, serve


def open_network(directory: Path, kind: str) -> Any:
    """Return a packed network."""
    from llm.llama.build import load_model
    from llm.llama.fused import pack

    if kind == "bfloat16":
        return pack(load_model(directory / "hf", dtype="bfloat16", to_pack=True))
    # llama.cpp's quantized files have a quantized output matrix too.
    return pack(load_model(directory / kind, to_pack=True), head_type="int8")


def open_runner(directory: Path, form: str, kind: str, threads: int) -> Any:
    """Return a runner; a program is exported the first time."""
    from llm.engine.runners import DygraphRunner, PredictorRunner
    from llm.llama.export import export_program

    if form == "dygraph":
        return DygraphRunner(open_network(directory, kind))
    place = directory / f"program-{kind}"
    if not place.is_dir():
        network = open_network(directory, kind)
        export_program(network, place / "llama", model_name="random", block_size=16)
    return PredictorRunner(place, "llama", device="cpu", threads=threads)


class Cases:
    """What a worker runs, on a runner."""

    def __init__(self, runner: Any, directory: Path, name: str) -> None:
        import numpy as np

        from llm.engine.batch import Batch

        self.np, self.batch, self.runner = np, Batch, runner
        self.logits_file = directory / f"{name}.npy"
        self.ids = shared.prompt(runner.vocab_size)
        self.width = -(-(shared.PROMPT + shared.STEPS) // runner.block_size)
        runner.allocate(self.width * max(shared.BATCHES))

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
        """Return what generates for so many sequences."""
        np = self.np
        for sequence in range(batch):
            self.prompt(shared.CONTEXT, sequence, [0])

        def run() -> None:
            ids = self.ids[:batch]
            for step in range(shared.STEPS):
                position = np.full(batch, shared.CONTEXT + step)
                ids = self._run(ids, np.arange(batch), position, np.arange(batch)).argmax(-1)

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
        if case == "check":
            return self.check
        if case == "bytes":
            return self.read_bytes
        if case == "prefill":
            return lambda: self.prompt(shared.PROMPT, 0, [shared.PROMPT - 1])
        return self.decode(int(case.split()[1]))


def main(form: str, kind: str, place: str, threads: int) -> None:
    """Serve one form of the model."""
    load_paddle(threads)
    directory = Path(place)
    runner = open_runner(directory, form, kind, threads)
    serve(Cases(runner, directory, f"{form}-{kind}").make)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
