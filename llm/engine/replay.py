"""Logits of given tokens from whatever executes steps: what a check compares, and its other half.

``python -m llm.engine.replay MODEL_DIR PREFIX`` takes ``{"sequences": [[id, …], …], "prompts":
[n, …], "target": "FILE", "threads": n, "device": "cpu"}`` on standard input and writes the exported
program's logits to the file, as NumPy's ``.npz``: of each sequence alone and of all together.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.ending import heed_starter
from llm import runtime

if TYPE_CHECKING:  # the batch's module loads no paddle, but runners do
    from llm.engine.batch import Runner

Span = tuple[int, int, int]
"""Tokens ``[start, end)`` of a sequence: its number, start, end."""


def one_by_one(sequences: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[list[Span]]:
    """Return steps in which each sequence is alone: its prompt, then token after token."""
    steps = []
    for number, (ids, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        steps.append([(number, 0, prompt)])
        steps += [[(number, place, place + 1)] for place in range(prompt, len(ids))]
    return steps


def together(sequences: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[list[Span]]:
    """Return steps that all sequences share: their prompts, then a token of each that has more."""
    steps = [[(number, 0, prompt) for number, prompt in enumerate(prompts)]]
    rest = [len(ids) - prompt for ids, prompt in zip(sequences, prompts, strict=True)]
    for turn in range(max(rest)):
        places = [(n, prompt + turn) for n, prompt in enumerate(prompts) if turn < rest[n]]
        steps.append([(number, place, place + 1) for number, place in places])
    return steps


def replay(
    runner: "Runner", sequences: Sequence[Sequence[int]], steps: Iterable[Sequence[Span]]
) -> NDArray[np.float32]:
    """Run steps over fresh cache blocks.

    Args:
        runner: its cache is allocated anew.
        sequences: token ids.
        steps: spans of one step are of different sequences in rising order; those of a sequence
            follow one another.

    Returns:
        float32 ``[tokens of all sequences, V]``, sequence after sequence; NaN for tokens that no
        step has run.
    """
    from llm.engine.batch import Batch, Part

    lengths = [len(ids) for ids in sequences]
    width = -(-max(lengths) // runner.block_size)
    # Neighbours in a sequence are none in memory.
    table = np.arange(len(lengths) * width, dtype=np.int32).reshape(width, -1).T
    runner.allocate(table.size)
    first = np.cumsum([0, *lengths])
    logits = np.full([first[-1], runner.vocab_size], np.nan, np.float32)
    for step in steps:
        rows = np.concatenate([first[n] + np.arange(start, end) for n, start, end in step])
        parts = [
            Part(sequences[n][start:end], start, table[n].tolist(), end - start)
            for n, start, end in step
        ]
        logits[rows] = runner.run(Batch.of(parts, runner.block_size))
    return logits


def both_ways(
    runner: "Runner", sequences: Sequence[Sequence[int]], prompts: Sequence[int]
) -> dict[str, NDArray[np.float32]]:
    """Return logits of :func:`replay` for sequences that run alone, and for all in one step."""
    ways = {"one by one": one_by_one, "together": together}
    return {name: replay(runner, sequences, way(sequences, prompts)) for name, way in ways.items()}


def main() -> None:
    """Answer one request from standard input."""
    heed_starter()
    model_dir, prefix = sys.argv[1:]
    request = json.load(sys.stdin)
    device = request["device"]
    threads = runtime.prepare(request["threads"], device)
    runtime.load_paddle(device)
    from llm.engine.runners import PredictorRunner

    runner = PredictorRunner(model_dir, prefix, device=device, threads=threads)
    found = both_ways(runner, request["sequences"], request["prompts"])
    np.savez(request["target"], **found)


if __name__ == "__main__":
    main()
