"""What the suite's own backend says of pairs of tokens: JSON on both standard streams.

Runs in the suite's environment, for test_lm_eval.py.
"""

import json
import sys

from llm.config.generation import OpenArguments
from llm.engine.finding import find_model
from llm.engine.opening import open_model
from llm.evaluation.scorer import open_scorer


def main() -> None:
    """Read a model and pairs of context and continuation; write their scores."""
    asked = json.load(sys.stdin)
    place = OpenArguments(model_name_or_path=asked["model"], device="cpu")
    place.validate()
    scorer = open_scorer(open_model(place, find_model(place)))
    found = scorer.loglikelihood([(pair[0], pair[1]) for pair in asked["pairs"]])
    print(json.dumps([[one.logprob, one.is_greedy] for one in found]))


if __name__ == "__main__":
    main()
