"""Bodies as JSON: what would be lost on the way is refused, what changes nothing is not."""

import json
from typing import Any

import pytest
from fakes import MakeClient
from flask.testing import FlaskClient

from llm.serving.bodies import read_json

USER = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# A right body of each route that takes one.
RIGHT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER, "max_tokens": 3},
    TEXT: {"prompt": "hi", "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 3},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/v1/messages": {"model": "default", "messages": USER, "max_tokens": 3},
    "/v1/messages/count_tokens": {"model": "default", "messages": USER},
    "/generate": {"inputs": "hi", "parameters": {"max_new_tokens": 3}},
    "/infer": {"inputs": "hi", "parameters": {"max_new_tokens": 3}},
    "/api/chat": {"context": "hi", "max_length": 3},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [2, 3]},
}


def post(client: FlaskClient, route: str, data: str | bytes, **options: Any) -> tuple[int, str]:
    headers = {"Content-Type": "application/json", **options}
    response = client.post(route, data=data, headers=headers)
    return response.status_code, response.get_data(as_text=True)


# What no reader gives back: parts of JSON texts, and a word of what is said of them.
LOST = [
    ('{"a": 1, "a": 2}', "'a' stands twice"),
    ('{"b": {"a": 1, "\\u0061": 1}}', "'a' stands twice"),
    ("1e400", "1e400 is too large"),
    ("-1e400", "-1e400 is too large"),
    ("NaN", "NaN is not JSON"),
    ("-Infinity", "-Infinity is not JSON"),
    ("9" * 5000, "more than 4300 digits"),
    ('"\\ud800"', "surrogate"),
    ("[" * 20_000, "100 deep"),
]


@pytest.mark.parametrize(("text", "message"), LOST)
def test_what_would_be_lost_is_no_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_json(text)


@pytest.mark.parametrize(("text", "message"), LOST)
@pytest.mark.parametrize("route", RIGHT)
def test_no_route_takes_it(make_client: MakeClient, route: str, text: str, message: str) -> None:
    client = make_client()
    body = json.dumps(RIGHT[route])[:-1] + f', "zzz": {text}}}'
    status, said = post(client, route, body)
    assert status == 400 and "not valid JSON" in said
    assert client.worker.served.engine.calls == []


@pytest.mark.parametrize(("text", "message"), LOST)
def test_nor_do_texts_of_json_within_bodies(
    make_client: MakeClient, text: str, message: str
) -> None:
    """Where a field is a JSON text: history of PaddleNLP's clients, schemas of others'."""
    client = make_client()
    for route, body in (
        ("/api/chat", {"context": "hi", "history": text}),
        (CHAT, {"messages": USER, "guided_json": f'{{"const": {text}}}'}),
        (CHAT, {"messages": USER, "structured_outputs": {"json": f'{{"const": {text}}}'}}),
        ("/generate", {"inputs": "hi", "parameters": {"grammar": grammar_of(text)}}),
    ):
        status, said = post(client, route, json.dumps(body))
        assert status == 400 and ("JSON" in said or message in said), (route, said)


def grammar_of(text: str) -> dict[str, str]:
    return {"type": "json", "value": f'{{"const": {text}}}'}


@pytest.mark.parametrize("route", RIGHT)
def test_unknown_fields_pass_at_null_alone(make_client: MakeClient, route: str) -> None:
    """Clients send back whole what an answer said, with fields that only their version knows."""
    client = make_client()
    assert post(client, route, json.dumps({**RIGHT[route], "zzz": None}))[0] == 200
    status, said = post(client, route, json.dumps({**RIGHT[route], "zzz": 0}))
    assert status == 400 and "unknown field 'zzz'" in said


@pytest.mark.parametrize("route", RIGHT)
def test_how_bodies_may_come(make_client: MakeClient, route: str) -> None:
    client, text = make_client(), json.dumps(RIGHT[route])
    assert post(client, route, b"\xef\xbb\xbf" + text.encode())[0] == 200, "with a mark of UTF-8"
    assert post(client, route, text, **{"Content-Encoding": "identity"})[0] == 200
    for coding in ("gzip", "br", "gzip, identity"):
        status, said = post(client, route, text, **{"Content-Encoding": coding})
        assert status == 415 and coding in said and "send the body as it is" in said


def test_whole_numbers_may_be_written_as_others(make_client: MakeClient) -> None:
    client = make_client()
    for route, whole in (
        (CHAT, {"messages": USER, "stop_token_ids": [5], "max_tokens": 3, "n": 1, "top_k": 2}),
        (TEXT, {"prompt": [5, 6], "max_tokens": 3, "best_of": 1, "logprobs": 1}),
        (TEXT, {"prompt": [[5, 6], [7]], "max_tokens": 3}),
        ("/generate", {"inputs": "a", "parameters": {"top_k": 2, "top_n_tokens": 1, "seed": 1}}),
        ("/generate", {"inputs": "a", "parameters": {"best_of": 1, "priority": 1, "timeout": 9}}),
        ("/infer_token", {"input_id": [5, 6], "parameters": {"max_new_tokens": 3}}),
        ("/api/chat", {"context": "hi", "max_length": 3, "top_k": 2}),
        ("/detokenize", {"tokens": [5, 6]}),
    ):
        written = json.dumps(whole)
        pointed = json.dumps(_pointed(whole))
        assert "." in pointed
        first, second = post(client, route, written), post(client, route, pointed)
        assert first[0] == second[0] == 200, (route, second)
    for wrong in ([5.5], [True], [5, "6"], [None]):
        status, said = post(client, TEXT, json.dumps({"prompt": wrong}))
        assert status == 400 and "prompt" in said


def _pointed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pointed(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_pointed(one) for one in value]
    return float(value) if type(value) is int else value


@pytest.mark.parametrize("key", ["9" * 5000, "05", "-1", "1.0", "٣", "x", ""])
def test_biases_are_keyed_by_token_ids(make_client: MakeClient, key: str) -> None:
    body = {"messages": USER, "logit_bias": {"5": 1, key: 1}}
    status, said = post(make_client(), CHAT, json.dumps(body))
    assert status == 400 and "which is no token id" in said and len(said) < 500


def test_a_path_that_is_nearly_a_route(make_client: MakeClient) -> None:
    client = make_client()
    for route, body in RIGHT.items():
        response = client.post(f"{route}/", json=body)
        assert response.status_code == 404
        assert f"send it to {route}" in response.get_data(as_text=True)
