"""lm-evaluation-harness over HTTP: the scores of the suite's own backend."""

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from .conftest import MODEL, Served, project

PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " made of cheese"),
    ("Question: what is two and two?\nAnswer:", " four, and not a thing more"),
    ("a", "b"),
]
TOLERANCE = 1e-5


@pytest.fixture
def harness(served: Served) -> Any:
    return LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model=served.model,
        tokenizer_backend="remote",
        num_concurrent=1,
        max_retries=1,
    )


def test_loglikelihood_is_that_of_the_process(harness: Any) -> None:
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
        for number, pair in enumerate(PAIRS)
    ]
    found = harness.loglikelihood(asked)
    ids = [harness._encode_pair(*pair) for pair in PAIRS]
    scores = project(Path(__file__).with_name("project_scores.py"), {"model": MODEL, "pairs": ids})
    for (there, there_greedy), (here, here_greedy) in zip(found, scores, strict=True):
        assert there == pytest.approx(here, abs=TOLERANCE)
        assert there_greedy == here_greedy


def test_generation(harness: Any) -> None:
    arguments = ("The sky is", {"until": ["\n"], "max_gen_toks": 8, "temperature": 0})
    (text,) = harness.generate_until(
        [Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)]
    )
    assert isinstance(text, str)
