"""Answers under random JSON schemas, at temperature 1: each ends by itself and is valid.

    python -m tests.fuzz.schemas --model outputs/demo/pretrained --cases 200

Without a model: random weights. Every other answer has its tokens guessed by prompt look-up.
`jsonschema` says what is valid.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from itertools import islice

from llm import runtime

runtime.prepare(2)

import jsonschema

from common.flags import load
from data.tokenizer import load_tokenizer
from llm.config.generation import OpenArguments
from llm.engine.engine import Engine
from llm.engine.finding import find_model
from llm.engine.opening import OpenedModel, open_model, open_network
from llm.engine.request import Completion, Request, SamplingParams
from llm.engine.speculation import PromptLookup
from llm.llama.build import build_model
from llm.llama.config import PRESETS, TINY_NAME
from tests.fuzz import Tally, budget
from tests.fuzz.schema_cases import Schema, whole

TOGETHER, MOST, PROMPT = 24, 1500, "Answer in JSON: "


def _open(directory: str | None) -> OpenedModel:
    if directory is None:
        network = build_model(PRESETS["tiny-random-llama"], seed=3)
        return open_network(network, load_tokenizer(TINY_NAME))
    (arguments,) = load((OpenArguments,), ["--model_name_or_path", directory], prog="schemas")
    return open_model(arguments, find_model(arguments))


def _wrong(opened: OpenedModel, schema: Schema, answer: Completion) -> str | None:
    """Return what is wrong with an answer."""
    text = opened.text(answer.ids)
    if answer.finish_reason != "stop":
        return f"does not end: {text[:200]!r} of {schema}"
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text[:200]!r} is not valid by {schema}: {error}"
    return None


def main(argv: Sequence[str]) -> int:
    """Answer under schemas within a budget."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default=None, help="a directory; random weights without")
    given, others = parser.parse_known_args(argv)
    plan, tally = budget(others, __doc__ or ""), Tally("schemas")
    opened = _open(given.model)
    prompt = tuple(opened.tokenizer.encode(PROMPT))
    most = min(MOST, opened.context)
    seeds = plan.seeds()
    while some := list(islice(seeds, TOGETHER)):
        schemas = [whole(random.Random(seed)) for seed in some]
        requests = [
            Request(
                prompt,
                SamplingParams(max_new_tokens=most - len(prompt), seed=seed),
                grammar=opened.grammars.compile("json_schema", schema),
            )
            for seed, schema in zip(some, schemas, strict=True)
        ]
        drafter = PromptLookup(5) if some[0] // TOGETHER % 2 else None
        engine = Engine(opened.runner, max_sequences=TOGETHER, max_tokens=most, drafter=drafter)
        for seed, schema, answer in zip(some, schemas, engine.generate(requests), strict=True):
            if wrong := _wrong(opened, schema, answer):
                tally.differ(seed, wrong)
            else:
                tally.count("valid with guesses" if drafter else "valid")
    return tally.report()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
