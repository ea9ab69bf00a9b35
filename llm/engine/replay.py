"""Greedy ids of an exported program, read and written as JSON: the other half of a check.

``python -m llm.engine.replay MODEL_DIR PREFIX`` takes ``{"prompts": [[id, …], …], "count": n,
"threads": n,
"device": "cpu"}`` on standard input and prints the ids of every prompt run alone and run together.
"""

import json
import sys

from common.ending import heed_starter
from llm import runtime


def main() -> None:
    """Answer one request from standard input."""
    heed_starter()
    model_dir, prefix = sys.argv[1:]
    request = json.load(sys.stdin)
    device = request["device"]
    threads = runtime.prepare(request["threads"], device)
    runtime.load_paddle(device)
    from llm.engine.engine import Engine
    from llm.engine.request import SamplingParams, requests
    from llm.engine.runners import PredictorRunner

    prompts, count = request["prompts"], request["count"]
    engine = Engine(
        PredictorRunner(model_dir, prefix, device=device, threads=threads),
        max_sequences=len(prompts),
        max_tokens=max(map(len, prompts)) + count,
    )
    params = SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)
    asked = requests(prompts, params)
    alone = [engine.generate([request])[0].ids for request in asked]
    together = [completion.ids for completion in engine.generate(asked)]
    json.dump({"one by one": alone, "batched": together}, sys.stdout)


if __name__ == "__main__":
    main()
