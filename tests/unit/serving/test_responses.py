"""OpenAI's Responses API: what the model sees of the input, and what comes back."""

import json
from typing import Any

import pytest
from fakes import FakeTokenizer, MakeClient, make_served, typed_events
from flask.testing import FlaskClient

URL = "/v1/responses"
BODY = {"model": "fake-llama", "input": "hi"}
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
G = {"type": "function", "name": "g"}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


def events(client: FlaskClient, body: Any) -> list[Any]:
    found = typed_events(client, URL, body)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def prompt_of(client: FlaskClient) -> str:
    return FakeTokenizer().decode(client.worker.served.engine.calls[-1][0])


def roomy(answer: str) -> Any:
    return make_served(answer, max_model_len=2000)


def test_a_response(make_client: MakeClient) -> None:
    client = make_client()
    body = {**BODY, "instructions": "be kind", "metadata": {"a": "b"}, "max_output_tokens": 9}
    response = client.post(URL, json=body).get_json()
    assert response["object"] == "response"
    assert (response["status"], response["incomplete_details"]) == ("completed", None)
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}
    ]
    prompt = len(client.worker.served.engine.calls[0][0])
    assert response["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 2},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + 3,
    }
    assert (response["metadata"], response["store"]) == ({"a": "b"}, False)
    assert prompt_of(client) == "<system>be kind<user>hi<assistant>"
    assert client.worker.served.engine.calls[0][1].max_new_tokens == 9


def test_the_events_of_a_text(make_client: MakeClient) -> None:
    stream = events(make_client(), BODY)
    assert [event["type"].removeprefix("response.") for event in stream] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done", "content_part.done"),
        *("output_item.done", "completed"),
    ]
    done = next(event for event in stream if event["type"] == "response.output_text.done")
    deltas = [event["delta"] for event in stream if event["type"].endswith("text.delta")]
    assert "".join(deltas) == done["text"] == "hello world"


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        ("hello world", {}),
        ("hello world", {"max_output_tokens": 1}),
        (f"hello {CALL}", {"tools": [TOOL]}),
        (CALL + CALL, {"tools": [TOOL]}),
    ],
)
def test_a_stream_makes_the_whole(make_client: MakeClient, answer: str, fields: Any) -> None:
    client = make_client(roomy(answer), src_length=1000, max_length=500)
    whole = client.post(URL, json={**BODY, **fields}).get_json()
    stream = events(client, {**BODY, **fields})
    last = stream[-1]["response"]
    done = [event["item"] for event in stream if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    for delta in (event for event in stream if event["type"].endswith(".delta")):
        assert delta["item_id"] == last["output"][delta["output_index"]]["id"]

    def bare(response: Any) -> Any:
        output = [{**item, "id": "", "call_id": ""} for item in response["output"]]
        return {**response, "id": "", "created_at": 0, "output": output}

    assert bare(last) == bare(whole)


def test_calls_of_tools(make_client: MakeClient) -> None:
    client = make_client(roomy(CALL), src_length=1000, max_length=500)
    response = client.post(URL, json={**BODY, "tools": [TOOL]}).get_json()
    (item,) = response["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "completed")
    assert json.loads(item["arguments"]) == {"city": "Oslo"}
    assert response["tools"] == [TOOL]
    assert response["tool_choice"] == "auto"


SCORED = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


@pytest.mark.parametrize("answer", ["hello world", "h\u00e9 \U0001f600 \u4e16", ""])
def test_scores_are_those_of_a_chat(make_client: MakeClient, answer: str) -> None:
    client = make_client(make_served(answer))
    asked = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    chat = client.post("/v1/chat/completions", json={**asked, "temperature": 0.5}).get_json()
    body = {**BODY, **SCORED, "temperature": 0.5}
    output = client.post(URL, json=body).get_json()["output"]
    stream = events(client, body)
    told = [one["logprobs"] for one in stream if one["type"] == "response.output_text.delta"]
    done = [one["logprobs"] for one in stream if one["type"] == "response.output_text.done"]
    if answer:
        expected = chat["choices"][0]["logprobs"]["content"]
        assert len(expected) > 1 and len(expected[0]["top_logprobs"]) == 2
        assert output[0]["content"][0]["logprobs"] == expected == done[0]
        assert [entry for part in told for entry in part] == expected
    else:
        assert output == told == done == []


def test_some_of_the_tools(make_client: MakeClient) -> None:
    client = make_client(roomy("hello"), src_length=1000)
    for mode in ("auto", "required"):
        choice = {"type": "allowed_tools", "mode": mode, "tools": [G]}
        body = {**BODY, "tools": [TOOL, G], "tool_choice": choice}
        response = client.post(URL, json=body).get_json()
        assert response["tool_choice"] == choice
        assert "weather" in prompt_of(client), "the model is told of all"
        grammar = client.worker.served.engine.asked[-1].grammar.source
        assert r'"g\"' in grammar and "weather" not in grammar


def test_numbers_of_tokens(make_client: MakeClient) -> None:
    client = make_client(roomy("hello"), src_length=1000)
    body = {**BODY, "instructions": "be kind", "tools": [TOOL]}
    counted = client.post(f"{URL}/input_tokens", json=body).get_json()
    client.post(URL, json={**body, "max_output_tokens": 1})
    prompt = len(client.worker.served.engine.calls[0][0])
    assert counted == {"object": "response.input_tokens", "input_tokens": prompt}


def test_the_limit_cuts(make_client: MakeClient) -> None:
    response = make_client().post(URL, json={**BODY, "max_output_tokens": 1}).get_json()
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_items_of_the_input(make_client: MakeClient) -> None:
    client = make_client(src_length=1000)
    told = [{"type": "output_text", "text": "b", "annotations": []}]
    call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
    items = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": told},
        {**call, "id": "f", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"role": "user", "content": "d"},
    ]
    body = {**BODY, "input": items, "instructions": "be brief"}
    client.post(URL, json=body)
    prompt = prompt_of(client)
    assert prompt.startswith("<system>be brief\nbe kind<user>a<assistant>b")
    assert "sun" in prompt
    assert prompt.endswith("d<assistant>")


def test_a_schema(make_client: MakeClient) -> None:
    client = make_client()
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    response = client.post(URL, json={**BODY, "text": {"format": form}}).get_json()
    (request,) = client.worker.served.engine.asked
    assert request.grammar == ("json_schema", '{"type": "object"}')
    assert response["text"]["format"]["schema"] == {"type": "object"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store=True: this server stores no responses; send store: false"),
    ({"previous_response_id": "resp_1"}, "send the whole conversation as input"),
    ({"conversation": "c"}, "send the whole conversation as input"),
    ({"background": True}, "send stream: true"),
    ({"input": [{"type": "item_reference", "id": "m"}]}, "send the whole conversation as input"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "has the type 'reasoning', but items here"),
    ({"input": [{"type": {}}]}, "has the type {}, but items here"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "reads text only"),
    ({"input": []}, "input=[]"),
    ({"tools": [{"type": "web_search"}]}, "a tool of type 'web_search', which the provider runs"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "send one of type function with a parameter"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [G]}},
        "tool_choice names 'g', which is not among the tools (weather)",
    ),
    ({"top_logprobs": 2}, "top_logprobs=2: only goes with include"),
    ({**SCORED, "top_logprobs": 21}, "top_logprobs=21"),
    ({**SCORED, "tools": [TOOL]}, "has no place where tools may be called"),
    ({"include": ["web_search_call.results"]}, "include.0='web_search_call.results'"),
    ({"truncation": "auto"}, "truncation='auto': is not supported"),
    ({"max_tokens": 3}, "unknown field 'max_tokens'"),
    ({"max_output_tokens": 51}, "at most 50 tokens"),
    ({"model": "other"}, "'other' is not served here"),
    ({"text": {"format": {"type": "json_schema"}}}, "has to have a schema"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_bodies(make_client: MakeClient, fields: Any, message: str) -> None:
    response = make_client().post(URL, json={**BODY, **fields})
    assert response.status_code in (400, 404)
    assert message in response.get_json()["error"]["message"]


def test_nothing_is_there_to_be_fetched(make_client: MakeClient) -> None:
    response = make_client().get(f"{URL}/resp_1")
    assert response.status_code == 404
    assert "stores nothing between requests" in response.get_json()["error"]["message"]


def test_an_error_within_a_stream(make_client: MakeClient) -> None:
    stream = events(make_client(make_served(fail_at=1)), BODY)
    assert (stream[-1]["type"], stream[-1]["code"]) == ("error", "engine_error")
