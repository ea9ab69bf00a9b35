"""This suite's engine without a server, for bench_serving.py: the same requests from Python.

python benchmarks/serving_engine.py MODEL THREADS SEQUENCES LENGTH STEP_TOKENS
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from interleave import serve
from record import ROOT

sys.path.insert(0, str(ROOT))


def main(place: str, threads: int, sequences: int, length: int, step_tokens: int) -> None:
    """Answer turns: a case is a JSON list of prompts, how many at a time, and new tokens."""
    from llm import runtime

    runtime.prepare(threads, "cpu")
    runtime.load_paddle("cpu")
    from llm.config.generation import OpenArguments
    from llm.engine.finding import find_model
    from llm.engine.opening import open_model
    from llm.engine.request import Request, SamplingParams

    program = (Path(place) / "llama.manifest.json").exists()
    named = {"model_dir": place} if program else {"model_name_or_path": place}
    which = OpenArguments(**named, dtype=None if program else "bfloat16", threads=threads)
    which.validate()
    model = open_model(which, find_model(which))
    engine = model.open_engine(
        sequences, length, max_step_tokens=step_tokens, usual_tokens=min(length, 2048)
    )

    def answer(prompts: list[list[int]], at_once: int, new: int) -> dict[str, float]:
        params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
        began, tokens, left, running = time.perf_counter(), 0, iter(prompts), 0
        while True:
            while running < at_once and (prompt := next(left, None)) is not None:
                engine.add(Request(prompt, params))
                running += 1
            if not running:
                return {"tokens": tokens, "seconds": time.perf_counter() - began}
            for sequence in engine.step():
                while sequence.produced:
                    tokens += 1
                    running -= sequence.produced.popleft().finish_reason is not None

    def make(case: str) -> Any:
        prompts, at_once, new = json.loads(case)
        return lambda: answer(prompts, at_once, new)

    serve(make)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
