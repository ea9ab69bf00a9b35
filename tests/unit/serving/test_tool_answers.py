"""Answers of a real network, of random weights, over the routes: forms, tools, scores."""

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from fakes import MakeClient
from flask.testing import FlaskClient
from test_serving_api import USER, sse

from data.tokenization.added_tokens import Region
from data.tokenizer import load_tokenizer
from external_ops import native
from llm.config.serving import ServerArguments
from llm.engine.opening import open_network
from llm.evaluation.scorer import NetworkScorer
from llm.llama.build import build_model
from llm.llama.config import PRESETS, TINY_NAME
from llm.llama.fused import pack
from llm.serving.steps import Loaded
from llm.serving.tools.dialect import AUTO
from llm.serving.tools.grammar import tool_grammar
from llm.serving.tools.parsers import PARSERS
from llm.serving.tools.schema import Function
from llm.serving.tools.stream import gather

CONFIG = PRESETS["tiny-random-llama"].replace(num_hidden_layers=1, max_position_embeddings=2048)
CHAT = "/v1/chat/completions"
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"$ref": "#/$defs/days"},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 0, "maximum": 40}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"additionalProperties": False}},
    },
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture(scope="module")
def served() -> Loaded:
    network = build_model(CONFIG, seed=3, to_pack=True)
    network = pack(network) if native.available() else network
    model = open_network(network, load_tokenizer(TINY_NAME, chat_template="chatml"))
    return Loaded(model, model.open_engine(8, 1500))


@pytest.fixture(params=PARSERS)
def client(request: Any, make_client: MakeClient, served: Loaded) -> Iterator[FlaskClient]:
    yield make_client(served, src_length=900, max_length=500, tool_call_parser=request.param)


def ask(client: FlaskClient, **fields: Any) -> Any:
    response = client.post(CHAT, json={"messages": USER, "max_tokens": 400, **fields})
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json()


def checked(calls: list[Any]) -> list[str]:
    """Return the names of calls whose arguments obey their schemas."""
    for call in calls:
        schema = {"type": "object", **SCHEMAS[call["function"]["name"]]}
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    return [call["function"]["name"] for call in calls]


def test_flag_names_the_parsers() -> None:
    field = ServerArguments.__dataclass_fields__["tool_call_parser"]
    assert tuple(field.metadata["choices"]) == (AUTO, *PARSERS)


def test_required_calls_obey_their_schemas(client: FlaskClient) -> None:
    """At temperature 1 on random weights, whole and streamed; one call where one is asked for."""
    fields = {"tools": TOOLS, "tool_choice": "required", "n": 6, "parallel_tool_calls": False}
    names = set()
    for seed in range(2):
        answer = ask(client, **fields, seed=seed)
        for choice in answer["choices"]:
            assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
            (name,) = checked(choice["message"]["tool_calls"])
            names.add(name)
    assert names == {"weather", "now"}
    body = {"messages": USER, "max_tokens": 400, **fields, "n": 1, "seed": 1, "stream": True}
    *events, _ = sse(client.post(CHAT, json=body))
    deltas = [event["choices"][0]["delta"] for event in events]
    pieces = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
    whole = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert "".join(piece["arguments"] for piece in pieces) == whole["arguments"]


def test_a_function_by_its_name_and_several_calls(client: FlaskClient) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    answer = ask(client, tools=TOOLS, tool_choice=named, n=2)
    for choice in answer["choices"]:
        assert checked(choice["message"]["tool_calls"]) == ["now"]
    # More calls come as often as the weights have it.
    counts = {
        len(checked(choice["message"]["tool_calls"]))
        for choice in ask(client, tools=TOOLS, tool_choice="required", n=8, seed=4)["choices"]
        if choice["finish_reason"] == "tool_calls"
    }
    assert counts - {1} or counts == {1}


@pytest.mark.parametrize("parser", PARSERS)
def test_a_function_without_parameters_takes_no_arguments(served: Loaded, parser: str) -> None:
    form = {"needed": True, "several": False, "otherwise": None, "control": frozenset[str]()}
    spec = tool_grammar(parser, {0: Function(name="now")}, **form)
    grammar, ends = served.model.grammars.compile(*spec), served.engine.eos_ids
    for seed in range(4):
        rng, matcher, ids = np.random.default_rng(seed), grammar.start(), []
        while not matcher.allowed()[ends[0]] and len(ids) < 200:
            ids.append(int(rng.choice(np.flatnonzero(matcher.allowed()))))
            matcher.take(ids[-1])
        text = b"".join(map(served.model.tokenizer.token_bytes, ids)).decode()
        _, calls = gather(PARSERS[parser](("now",)).push(text, last=True))
        assert [(one.name, json.loads(one.arguments)) for one in calls] == [("now", {})]


@pytest.mark.parametrize(
    ("parser", "begun"),
    [("hermes", "Well.\n<tool_call>"), ("llama3_json", ' {"name": "'), ("pythonic", "[weather(")],
)
def test_calls_that_have_begun_are_held(served: Loaded, parser: str, begun: str) -> None:
    """Random tokens of those that may follow make a whole call; before, and elsewhere, all may."""
    functions = {number: Function(**tool["function"]) for number, tool in enumerate(TOOLS)}
    form = {"needed": False, "several": False, "otherwise": None, "control": frozenset[str]()}
    grammar = served.model.grammars.compile(*tool_grammar(parser, functions, **form))
    model, ends = served.model, served.engine.eos_ids
    free = model.tokenizer.encode('Hello {"x": [1]} <tool> 中')
    assert grammar.start().num_allowed(free) == len(free)
    for seed in range(12):
        rng, matcher = np.random.default_rng(seed), grammar.start()
        ids = model.tokenizer.encode_regions([Region((begun,), "bare")])[0].ids
        for token_id in ids:
            matcher.take(token_id)
        assert not matcher.allowed()[ends[0]], "it has to be ended"
        while not matcher.allowed()[ends[0]] and len(ids) < 900:
            ids.append(int(rng.choice(np.flatnonzero(matcher.allowed()))))
            matcher.take(ids[-1])
        text = b"".join(map(model.tokenizer.token_bytes, ids)).decode()
        shown, calls = gather(PARSERS[parser](tuple(SCHEMAS)).push(text, last=True))
        assert shown == ("Well." if parser == "hermes" else "") and len(calls) == 1
        found = {"name": calls[0].name, "arguments": calls[0].arguments}
        assert checked([{"function": found}])


def test_lm_evals_loglikelihood(make_client: MakeClient, served: Loaded) -> None:
    """The harness' arithmetic on what the route tells, beside the scores of our own evaluation."""
    client = make_client(served, src_length=900)
    rng = np.random.default_rng(2)
    pairs = [
        (rng.integers(3, 900, size).tolist(), rng.integers(3, 900, more).tolist())
        for size, more in ((1, 5), (30, 1), (90, 40))
    ]
    body = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    answer = client.post(
        "/v1/completions", json={**body, "prompt": [[*before, *after] for before, after in pairs]}
    ).get_json()
    exact = NetworkScorer(build_model(CONFIG, seed=3)).loglikelihood(pairs)
    for (before, after), choice, score in zip(pairs, answer["choices"], exact, strict=True):
        told = SimpleNamespace(**choice["logprobs"])
        assert len(told.tokens) == len(before) + len(after) + 1
        behind = slice(len(before), -1)
        assert sum(told.token_logprobs[behind]) == pytest.approx(score.logprob, abs=1e-5)
        rows = zip(told.tokens[behind], told.top_logprobs[behind], strict=True)
        assert all(name == max(top, key=top.get) for name, top in rows) == score.is_greedy


@pytest.mark.parametrize("kind", ["json_schema", "regex", "choice", "grammar"])
def test_answers_in_a_form(make_client: MakeClient, served: Loaded, kind: str) -> None:
    client = make_client(served, src_length=900, max_length=500)
    fields: Any = {
        "json_schema": {
            "response_format": {"type": "json_schema", "json_schema": {"schema": PLACE}}
        },
        "regex": {"guided_regex": "[ab]{3}"},
        "choice": {"structured_outputs": {"choice": ["yes", "no"]}},
        "grammar": {"guided_grammar": 'root ::= "x" [0-9]'},
    }[kind]
    for choice in ask(client, **fields, n=4)["choices"]:
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        if kind == "json_schema":
            jsonschema.validate(json.loads(text), PLACE)
        else:
            forms = {"regex": "[ab]{3}", "choice": "yes|no", "grammar": "x[0-9]"}
            assert re.fullmatch(forms[kind], text)
