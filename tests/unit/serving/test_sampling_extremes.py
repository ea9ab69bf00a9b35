"""The extremes of every number by which tokens are chosen, through the flags and over HTTP.

Each is the likeliest token, a token that is drawn, or a refusal that names the number: never an
error of NumPy's, and never a token out of infinities.
"""

import json
from typing import Any

import numpy as np
import pytest
from fakes import MakeClient, make_served

from common.errors import UserError
from common.flags import load
from llm.config.generation import SamplingArguments
from llm.engine.request import Request, SamplingParams
from llm.engine.sampler import sample_rows
from llm.engine.sequence import Row, Sequence
from llm.serving.terminal import sampling_params

# Logits as wide as trained models have them; seen tokens are the likeliest and the least likely.
LOGITS = np.array([31.5, -44.0, 12.25, 31.0, 0.0], np.float32)
SEEN = (0, 1)
GREEDY, DRAWN, REFUSED = "greedy", "drawn", "refused"

# Field, value, and what it means.
EXTREMES: list[tuple[str, Any, str]] = [
    ("temperature", 0, GREEDY),
    *(("temperature", value, GREEDY) for value in (5e-324, 1e-308, 1e-300, 1e-38, 1e-3)),
    *(("temperature", value, DRAWN) for value in (2.0, 1, 0.5)),
    *(("temperature", value, REFUSED) for value in (-5e-324, -1, 100.5, 1e308)),
    *(("top_p", value, GREEDY) for value in (5e-324, 1e-300, 1e-9)),
    *(("top_p", value, DRAWN) for value in (1, 1.0, 1 - 1e-16)),
    *(("top_p", value, REFUSED) for value in (0, -1e-300, 1.0000001, 1e308)),
    ("top_k", 1, GREEDY),
    *(("top_k", value, DRAWN) for value in (2, 5, 2**31, 2**63, 10**30)),
    *(("top_k", value, REFUSED) for value in (-2, -(10**30))),
    *(("repetition_penalty", value, DRAWN) for value in (0.01, 0.5, 1, 2, 100)),
    *(("repetition_penalty", value, REFUSED) for value in (0, 5e-324, 1e-300, -1, 1e30, 1e308)),
    *(("seed", value, DRAWN) for value in (0, 2**32, 2**63 - 1)),
    *(("seed", value, REFUSED) for value in (-2, -(2**63))),
]
WAYS = ("flags", "/v1/chat/completions", "/v1/completions", "/generate")
# What a way's own rules refuse: OpenAI's temperature ends at 2, TGI's begins above 0.
OWN = {("/generate", "temperature", 0): REFUSED}


def params_of(way: str, fields: dict[str, Any], make_client: MakeClient) -> SamplingParams:
    """What reaches the engine.

    Raises:
        UserError: refused, as the way says it.
    """
    if way == "flags":
        words = [word for key, value in fields.items() for word in (f"--{key}", str(value))]
        (args,) = load([SamplingArguments], words, prog="test")
        return sampling_params(args)
    client = make_client(make_served())
    body: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], **fields},
        "/v1/completions": {"prompt": "hi", **fields},
        "/generate": {"inputs": "hi", "parameters": {"do_sample": True, **fields}},
    }[way]
    answer = client.post(way, json=body)
    if answer.status_code != 200:
        assert answer.status_code in (400, 422), answer.get_json()
        raise UserError(str(answer.get_json()))
    (_, params), *_ = client.worker.served.engine.calls
    return params


def draws(logits: Any, params: SamplingParams) -> set[int]:
    """The tokens of forty choices."""
    rows = [Row(Sequence.of(Request(SEEN, params, choice), ())) for choice in range(40)]
    return {one.token_id for one in sample_rows(np.tile(logits, [40, 1]), rows)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "value", "meaning"), EXTREMES, ids=str)
def test_extremes(way: str, name: str, value: Any, meaning: str, make_client: MakeClient) -> None:
    meaning = OWN.get((way, name, value), meaning)
    fields = {name: value}
    if way == "flags" and name != "temperature":
        fields["decode_strategy"] = "sampling"
    if meaning == REFUSED:
        with pytest.raises(UserError) as caught:
            params_of(way, fields, make_client)
        assert name in str(caught.value)
        return
    params = params_of(way, fields, make_client)
    if name != "top_k" or value < 2**31:
        assert getattr(params, name) == value
    drawn = draws(LOGITS, params)
    if meaning == GREEDY:
        assert drawn == {0}
    elif name != "repetition_penalty":
        assert drawn == {0, 3}
    elif value < 1:  # what was seen becomes likelier still, if it was likely
        assert drawn == {0}
    elif value > 1:
        assert drawn == {3}


def test_likely_tokens_that_are_equal_are_drawn_alike() -> None:
    params = SamplingParams(temperature=1e-308, seed=1)
    logits = np.array([3.0, 7.0, 7.0, -2.0], np.float32)
    assert draws(logits, params) == {1, 2}


def test_a_drawn_seed_is_reported_and_gives_the_answer_again(make_client: MakeClient) -> None:
    client = make_client()

    def seeds(**parameters: Any) -> tuple[Any, Any]:
        body = {"inputs": "hi", "parameters": {"details": True, **parameters}}
        reported = client.post("/generate", json=body).get_json()["details"]["seed"]
        return reported, client.worker.served.engine.calls[-1][1].seed

    first, used = seeds(temperature=0.7)
    assert first == used and 0 <= first < 2**53
    assert seeds(temperature=0.7)[0] != first
    assert seeds(temperature=0.7, seed=first) == (first, first)
    assert seeds() == (None, None), "greedy answers need none"
    body = {"inputs": "hi", "stream": True, "parameters": {"top_k": 5}}
    streamed = client.post("/generate", json=body).get_data(as_text=True)
    last = json.loads(streamed.strip().split("data:")[-1])
    assert last["details"]["seed"] == client.worker.served.engine.calls[-1][1].seed
