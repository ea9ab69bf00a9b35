"""Requests of PaddleNLP's clients, old and new, and how these read what comes back."""

import json
from typing import Any

import pytest
from fakes import FakeTokenizer, MakeClient, make_served
from flask.testing import FlaskClient

CHAT = "/v1/chat/completions"
# What llm/predict/request_flask_server.py sends, but for the lengths.
SAMPLE = {"messages": [{"role": "user", "content": "hi"}], "max_length": 20, "src_length": 90}
OLD = {"context": "hi", "top_k": 0, "top_p": 0.7, "temperature": 0.95, "max_length": 9}


def text_of_events(client: FlaskClient, body: Any) -> str:
    """Read a stream as the sample does: line by line, the message of the first choice."""
    text = ""
    for line in client.post(CHAT, json=body).get_data().splitlines():
        data = line.decode().removeprefix("data:").strip()
        if data and data != "[DONE]":
            text += json.loads(data)["choices"][0]["message"]["content"]
    return text


def prompt_of(client: FlaskClient) -> str:
    return FakeTokenizer().decode(client.worker.served.engine.calls[-1][0])


def test_the_sample(make_client: MakeClient) -> None:
    client = make_client()
    body = {**SAMPLE, "min_length": 1, "model": "paddlenlp"}
    assert text_of_events(client, body) == "hello world"
    assert prompt_of(client) == "<user>hi<assistant>"
    assert client.worker.served.engine.calls[-1][1].max_new_tokens == 20
    last = client.post(CHAT, json=body).get_data(as_text=True).strip().split("\n\n")
    assert last[-1] == "data: [DONE]"
    assert json.loads(last[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"


def test_stream_asks_for_openais_shapes(make_client: MakeClient) -> None:
    client = make_client()
    whole = client.post(CHAT, json={**SAMPLE, "stream": False}).get_json()
    assert whole["choices"][0]["message"]["content"] == "hello world"
    first = client.post(CHAT, json={**SAMPLE, "stream": True}).get_data(as_text=True)
    assert '"delta"' in first


@pytest.mark.parametrize(
    "history",
    [
        ["a", "b"],
        [{"role": "user", "utterance": "a"}, {"role": "bot", "utterance": "b"}],
        '["a", "b"]',
    ],
)
def test_the_older_server(make_client: MakeClient, history: Any) -> None:
    client = make_client()
    response = client.post("/api/chat", json={**OLD, "history": history, "extra_info": "x"})
    lines = [json.loads(line) for line in response.get_data(as_text=True).splitlines()]
    assert {line["error_code"] for line in lines} == {0}
    said = "".join(line["result"]["response"]["utterance"] for line in lines)
    assert said == "hello world"
    assert prompt_of(client) == "<user>a<assistant>b<user>hi<assistant>"
    params = client.worker.served.engine.calls[-1][1]
    assert (params.top_p, params.temperature, params.max_new_tokens) == (0.7, 0.95, 9)


def test_a_context_is_the_prompt_where_there_is_no_template(make_client: MakeClient) -> None:
    client = make_client(make_served(tokenizer=FakeTokenizer(chat_template=None)))
    client.post("/api/chat", json=OLD)
    assert prompt_of(client) == "hi"
    refused = client.post("/api/chat", json={**OLD, "history": ["a", "b"]}).get_json()
    assert "has no chat template" in refused["error_msg"]


@pytest.mark.parametrize("greedy", [{"top_p": 0.0}, {"decode_strategy": "greedy_search"}])
def test_greedy(make_client: MakeClient, greedy: Any) -> None:
    client = make_client()
    client.post("/api/chat", json={**OLD, **greedy})
    assert client.worker.served.engine.calls[-1][1].temperature == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"src_length": 3}, "context has 20 tokens, but src_length=3; shorten it, or raise"),
        ({"max_length": 51}, "max_length=51, but this server answers with at most 50"),
        ({"min_length": 2}, "min_length=2: is not supported"),
        ({"decode_strategy": "beam_search"}, "send sampling or greedy_search"),
        ({"decode_strategy": "best"}, "decode_strategy='best'"),
        ({"history": ["a"]}, "has 1 turns; user and assistant"),
        ({"history": "a"}, "is a text that is not JSON"),
        ({"history": [1, 2]}, "history.0=1"),
        ({"messages": []}, "messages=[]"),
        ({"max_lenght": 3}, "did you mean 'max_length'"),
        ({"model": "other"}, "'other' is not served here"),
    ],
)
def test_bad_fields(make_client: MakeClient, fields: Any, message: str) -> None:
    response = make_client().post("/api/chat", json={**OLD, **fields})
    body = response.get_json()
    assert response.status_code in (400, 404)
    assert body["error_code"] == 1
    assert message in body["error_msg"]


def test_an_error_on_the_chat_route_is_openais(make_client: MakeClient) -> None:
    client = make_client()
    error = client.post(CHAT, json={**SAMPLE, "max_length": 51}).get_json()["error"]
    assert error["param"] == "max_length"
