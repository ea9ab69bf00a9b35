"""Requests in text-generation-inference's form and in MindIE's."""

import json
from typing import Any

import pytest
from fakes import BOS, FakeTokenizer, MakeClient, make_served
from flask.testing import FlaskClient

from llm.serving.requests import Event, Plan, Prompt
from llm.serving.text import Answer
from llm.serving.tgi.format import GenerateFormat

BODY = {"inputs": "hi", "parameters": {"details": True}}


def events(client: FlaskClient, path: str, body: Any) -> list[Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.get_data(as_text=True)
    blocks = response.get_data(as_text=True).strip().split("\n\n")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def last_params(client: FlaskClient) -> Any:
    return client.worker.served.engine.calls[-1][1]


def test_the_root_answers_a_list(make_client: MakeClient) -> None:
    client = make_client()
    whole = client.post("/generate", json=BODY).get_json()
    assert client.post("/", json=BODY).get_json() == [whole]
    assert whole["generated_text"] == "hello world"
    assert whole["details"]["prompt_tokens"] == whole["details"]["input_length"] == 3
    streamed = events(client, "/", {**BODY, "stream": True})
    assert streamed == events(client, "/generate_stream", BODY)
    assert streamed[-1]["generated_text"] == "hello world"


def test_the_best_of_several_and_the_others(make_client: MakeClient) -> None:
    client = make_client()
    parameters = {"best_of": 3, "do_sample": True, "details": True, "seed": 4}
    body = {"inputs": "hi", "parameters": parameters}
    details = client.post("/generate", json=body).get_json()["details"]
    assert client.worker.served.engine.choices == [0, 1, 2]
    others = details["best_of_sequences"]
    assert [one["generated_text"] for one in others] == ["hello world"] * 2
    assert {one["seed"] for one in others} == {4}


def test_the_likeliest_comes_first() -> None:
    answers = [Answer(finish_reason="stop", num_tokens=n, logprob=p) for n, p in _SCORED]
    events = [Event(place, [], answer, 0, 1) for place, answer in enumerate(answers)]
    prompt = Prompt([BOS], "hi", (), 9)
    plan = Plan([prompt], {"logprobs": 0, "seed": 4}, n=len(events))
    shape = GenerateFormat(plan, make_served().model, details=True)
    details = shape.whole(reversed(events))["details"]
    counts = [one["generated_tokens"] for one in (details, *details["best_of_sequences"])]
    assert counts == [4, 2, 3], "by the mean of each, not by the sum"


# Tokens and the sum of their log-probabilities: means of -1, -1.5 and -0.5.
_SCORED = [(2, -2.0), (3, -4.5), (4, -2.0)]


def test_the_prompts_tokens_and_alternatives(make_client: MakeClient) -> None:
    client = make_client()
    parameters = {"decoder_input_details": True, "top_n_tokens": 2, "max_new_tokens": 2}
    body = {"inputs": "hi", "parameters": parameters}
    details = client.post("/generate", json=body).get_json()["details"]
    prefill = details["prefill"]
    assert [one["id"] for one in prefill] == FakeTokenizer().encode("hi", add_bos=True)
    assert prefill[0]["logprob"] is None
    assert all(one["logprob"] < 0 for one in prefill[1:])
    assert [one["text"] for one in prefill[1:]] == ["h", "i"]
    assert [len(top) for top in details["top_tokens"]] == [2, 2]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert any(one["id"] == token["id"] for one in top)
    del parameters["decoder_input_details"]
    for chunk in events(client, "/generate_stream", body):
        assert len(chunk["top_tokens"]) == 2


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"typical_p": 0.5}, "typical_p", 0.5),
        ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
        ({"typical_p": 0.5}, "temperature", 1.0),
        ({"frequency_penalty": 0.5}, "temperature", 0.0),
        ({"top_n_tokens": 3}, "logprobs", 3),
        ({"decoder_input_details": True}, "prompt_logprobs", 0),
    ],
)
def test_parameters_reach_the_engine(
    make_client: MakeClient, given: Any, name: str, value: Any
) -> None:
    client = make_client()
    client.post("/generate", json={"inputs": "hi", "parameters": given})
    assert getattr(last_params(client), name) == value


@pytest.mark.parametrize(
    ("grammar", "kind", "source"),
    [
        ({"type": "regex", "value": "a+"}, "regex", "a+"),
        ({"type": "json", "value": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"type": "json", "value": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
        ({"type": "json_schema", "value": {"schema": {}}}, "json_schema", "{}"),
    ],
)
def test_grammars(make_client: MakeClient, grammar: Any, kind: str, source: str) -> None:
    client = make_client()
    client.post("/generate", json={"inputs": "hi", "parameters": {"grammar": grammar}})
    assert client.worker.served.engine.asked[-1].grammar == (kind, source)


REFUSED = [
    ("/generate", {"best_of": 2}, "send do_sample: true"),
    ("/generate", {"watermark": True}, "parameters.watermark=True: is not supported"),
    ("/generate", {"adapter_id": "de"}, "parameters.adapter_id='de' is not served here"),
    ("/generate", {"grammar": {"type": "regex", "value": "("}}, "parameters.grammar: "),
    ("/generate", {"grammar": {"type": "regex", "value": {}}}, "of a regex has to be a text"),
    ("/generate", {"grammar": {"type": "json_schema", "value": {}}}, 'has to be {"schema": {...}}'),
    ("/generate", {"grammar": {"type": "json", "value": "{"}}, "parameters.grammar: "),
    ("/generate", {"priority": 6}, "parameters.priority=6"),
    ("/generate", {"timeout": 0}, "parameters.timeout=0"),
    ("/generate_stream", {"best_of": 2, "do_sample": True}, "when all have ended"),
    ("/generate_stream", {"decoder_input_details": True}, "has no place in a stream"),
    ("/infer", {"best_of": 2}, "parameters.best_of=2: is not supported"),
    ("/infer", {"decoder_input_details": True}, "is not supported"),
    ("/infer", {"maxnewtokens": 3}, "did you mean 'max_new_tokens'"),
]


@pytest.mark.parametrize(("path", "parameters", "message"), REFUSED)
def test_refusals(make_client: MakeClient, path: str, parameters: Any, message: str) -> None:
    response = make_client().post(path, json={"inputs": "hi", "parameters": parameters})
    assert response.status_code in (400, 404)
    assert message in response.get_json()["error"]


def test_a_stream_that_shall_be_none(make_client: MakeClient) -> None:
    response = make_client().post("/generate_stream", json={"inputs": "hi", "stream": False})
    assert "stream=false contradicts /generate_stream" in response.get_json()["error"]


def test_info(make_client: MakeClient) -> None:
    info = make_client().get("/info").get_json()
    assert info["model_id"] == "fake-llama"
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (100, 200)
    assert (info["max_stop_sequences"], info["max_best_of"]) == (16, 64)


# MindIE's own routes


def test_infer(make_client: MakeClient) -> None:
    client = make_client()
    parameters = {
        "temperature": 0.5,
        "top_k": 10,
        "top_p": 0.95,
        "max_new_tokens": 20,
        "do_sample": True,
        "seed": None,
        "repetition_penalty": 1.03,
        "details": True,
        "typical_p": 0.5,
        "watermark": False,
        "priority": 1,
        "timeout": 10,
        "batch_size": 3,
    }
    body = {"inputs": "hi", "stream": False, "parameters": parameters}
    whole = client.post("/infer", json=body).get_json()
    assert whole["generated_text"] == "hello world"
    assert whole["details"]["finish_reason"] == "eos_token"
    assert whole["details"]["generated_tokens"] == 3
    assert isinstance(whole["details"]["seed"], int)
    first, *between, last = events(client, "/infer", {**body, "stream": True})
    assert first["prefill_time"] >= 0
    assert first["decode_time"] is None
    assert [one["prefill_time"] for one in (*between, last)] == [None, None]
    assert first["token"] == {"id": [259], "text": "hello"}
    assert last["generated_text"] == "hello world"
    requests = client.worker.served.engine.asked
    assert [request.priority for request in requests] == [-4, -4]


def test_infer_without_details_takes_twenty_tokens(make_client: MakeClient) -> None:
    client = make_client()
    assert client.post("/infer", json={"inputs": "hi"}).get_json() == {
        "generated_text": "hello world"
    }
    assert last_params(client).max_new_tokens == 20


def test_infer_from_ids(make_client: MakeClient) -> None:
    client = make_client()
    assert client.post("/infer_token", json={"input_id": [BOS, 7]}).status_code == 200
    assert client.worker.served.engine.calls[-1][0] == [BOS, 7]
    wrong = client.post("/infer_token", json={"input_id": [999]}).get_json()["error"]
    assert "input_id has the token id 999" in wrong


def test_a_request_runs_out_of_time(make_client: MakeClient) -> None:
    client = make_client(make_served(repeat=True, delay=0.3))
    body = {"inputs": "hi", "parameters": {"timeout": 1, "max_new_tokens": 20}}
    response = client.post("/infer", json=body)
    assert response.status_code == 408
    assert "did not end within timeout=1 seconds" in response.get_json()["error"]


def test_prompts_in_vllms_form(make_client: MakeClient) -> None:
    client = make_client()
    body = {
        "prompt": "hi ",
        "max_tokens": 20,
        "repetition_penalty": 1.03,
        "temperature": 0.5,
        "presence_penalty": 1.2,
        "frequency_penalty": 1.2,
        "top_p": 0.95,
        "top_k": 10,
        "seed": None,
        "stop": None,
        "stop_token_ids": None,
        "model": "None",
        "n": 2,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "best_of": 2,
        "ignore_eos": False,
        "stream": False,
    }
    assert client.post("/generate", json=body).get_json() == {"text": ["hi hello world"] * 2}
    streamed = client.post("/generate", json={**body, "stream": True}).get_data(as_text=True)
    chunks = [json.loads(one) for one in streamed.split("\0") if one]
    assert streamed.endswith("\0")
    joined = ["".join(parts) for parts in zip(*(one["text"] for one in chunks), strict=True)]
    assert joined == ["hello world"] * 2, "of a stream each chunk is new"
    client.post("/generate", json={"prompt": "hi"})
    assert last_params(client).max_new_tokens == 50, "as many as the server allows"
    for wrong, message in (
        ({"prompt": "hi", "logprobs": 1}, "logprobs=1: is not supported"),
        ({"prompt": ["hi"]}, "prompt=['hi'] has to be one text"),
    ):
        assert message in client.post("/generate", json=wrong).get_json()["error"]


def test_numbers_of_tokens(make_client: MakeClient) -> None:
    found = make_client().post("/v1/tokenizer", json={"inputs": "hello"}).get_json()
    assert found == {"token_number": 2, "tokens": ["<s>", "hello"]}
