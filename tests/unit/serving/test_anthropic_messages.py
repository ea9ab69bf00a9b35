"""Anthropic's Messages API: what the model sees of a conversation, and what comes back."""

import json
from typing import Any

import pytest
from fakes import FakeTokenizer, MakeClient, make_served, typed_events
from flask.testing import FlaskClient

from llm.serving.keys import Keys

URL = "/v1/messages"
USER = [{"role": "user", "content": "hi"}]
BODY = {"model": "fake-llama", "max_tokens": 20, "messages": USER}
TOOL = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


def events(client: FlaskClient, body: Any) -> list[Any]:
    return typed_events(client, URL, body)


def joined(stream: list[Any]) -> dict[str, Any]:
    """Build the message of a stream as clients do: start, blocks, deltas, end."""
    first, *rest = stream
    message: dict[str, Any] = first["message"]
    texts: dict[int, str] = {}
    for event in rest:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            texts[event["index"]] = ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            texts[event["index"]] += delta.get("text", delta.get("partial_json", ""))
        elif event["type"] == "content_block_stop":
            block, text = message["content"][event["index"]], texts[event["index"]]
            if block["type"] == "text":
                block["text"] = text
            else:
                block["input"] = json.loads(text)
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] |= event["usage"]
    assert rest[-1] == {"type": "message_stop"}
    return message


def without_ids(message: Any) -> Any:
    content = [{**block, "id": ""} for block in message["content"]]
    return {**message, "id": "", "content": content}


def prompt_of(client: FlaskClient) -> str:
    return FakeTokenizer().decode(client.worker.served.engine.calls[-1][0])


def test_a_message(make_client: MakeClient) -> None:
    client = make_client()
    body = {**BODY, "system": "be kind", "metadata": {"user_id": "x"}, "top_k": 4}
    message = client.post(URL, json=body, headers={"anthropic-version": "2023-06-01"}).get_json()
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "fake-llama",
        "content": [{"type": "text", "text": "hello world"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(client.worker.served.engine.calls[0][0]),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 3,
        },
    }
    assert prompt_of(client) == "<system>be kind<user>hi<assistant>"
    params = client.worker.served.engine.calls[0][1]
    assert (params.max_new_tokens, params.top_k, params.temperature) == (20, 4, 1.0)


def test_what_the_cache_had_is_told_where_it_is_asked_for(make_client: MakeClient) -> None:
    marked = [{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}]
    client = make_client()
    usage = client.post(URL, json={**BODY, "system": marked}).get_json()["usage"]
    prompt = len(client.worker.served.engine.calls[0][0])
    assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (2, prompt - 2)


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        ("hello world", {}),
        ("hello world", {"stop_sequences": ["wor"]}),
        ("hello world", {"max_tokens": 1}),
        (f"hello {CALL}", {"tools": [TOOL]}),
        (CALL + CALL, {"tools": [TOOL]}),
    ],
)
def test_a_stream_makes_the_whole(make_client: MakeClient, answer: str, fields: Any) -> None:
    client = make_client(make_served(answer, max_model_len=2000), src_length=1000, max_length=500)
    body = {**BODY, "max_tokens": 400, **fields}
    whole = client.post(URL, json=body).get_json()
    assert without_ids(joined(events(client, body))) == without_ids(whole)


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 1}, "max_tokens", None),
        ({"stop_sequences": ["zzz", "wor"]}, "stop_sequence", "wor"),
    ],
)
def test_why_it_ended(
    make_client: MakeClient, fields: Any, reason: str, sequence: str | None
) -> None:
    message = make_client().post(URL, json={**BODY, **fields}).get_json()
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


def test_calls_of_tools(make_client: MakeClient) -> None:
    client = make_client(make_served(CALL, max_model_len=2000), src_length=1000, max_length=500)
    body = {**BODY, "max_tokens": 400, "tools": [TOOL]}
    message = client.post(URL, json=body).get_json()
    (block,) = message["content"]
    assert block.pop("id").startswith("toolu_")
    assert block == {"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}}
    assert message["stop_reason"] == "tool_use"
    cut = client.post(URL, json={**body, "max_tokens": 70}).get_json()
    assert cut["stop_reason"] == "max_tokens"


def test_turns_of_a_conversation(make_client: MakeClient) -> None:
    client = make_client(src_length=1000)
    text = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{**text, "text": "sun"}]}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [text]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}, USE]},
        {"role": "user", "content": [{**result, "is_error": True}, {**text, "text": "d"}]},
    ]
    client.post(URL, json={**BODY, "messages": messages})
    prompt = prompt_of(client)
    assert prompt.startswith("<user>a\nb<assistant>c")
    assert "Error: sun" in prompt
    assert prompt.endswith("d<assistant>")


def test_the_last_turn_begins_the_answer(make_client: MakeClient) -> None:
    client = make_client()
    messages = [*USER, {"role": "assistant", "content": "well,"}]
    client.post(URL, json={**BODY, "messages": messages})
    assert prompt_of(client) == "<user>hi<assistant>well,"


def test_a_last_turn_without_text_begins_nothing(make_client: MakeClient) -> None:
    client = make_client()
    for content in ("", []):
        messages = [*USER, {"role": "assistant", "content": content}]
        client.post(URL, json={**BODY, "messages": messages})
        assert prompt_of(client) == "<user>hi<assistant>"


def test_a_turn_of_the_operator_amid_the_others(make_client: MakeClient) -> None:
    client = make_client()
    told = {"role": "system", "content": [{"type": "text", "text": "now"}]}
    client.post(URL, json={**BODY, "messages": [*USER, told, *USER]})
    assert prompt_of(client) == "<user>hi<system>now<user>hi<assistant>"


def test_what_is_off_or_of_the_provider_alone(make_client: MakeClient) -> None:
    client = make_client(make_served(max_model_len=2000), src_length=1000)
    off = {"speed": "standard", "context_management": {"edits": []}, "thinking": None}
    books = {"user_profile_id": "u", "diagnostics": {"previous_message_id": None}}
    streamed = {**TOOL, "eager_input_streaming": True, "allowed_callers": ["direct"]}
    response = client.post(URL, json={**BODY, **off, **books, "tools": [streamed]})
    assert response.status_code == 200, response.get_json()


def test_its_client_is_told_to_go_on_without_threads(make_client: MakeClient) -> None:
    """``anthropic.lib.threads`` looks for this and then sends conversations whole."""
    response = make_client().post(URL, json={**BODY, "thread": {"type": "create"}})
    error = response.get_json()["error"]
    assert response.status_code == 400 and "send the whole conversation" in error["message"]
    assert error["details"] == {
        "error_code": "thread_unsupported_request",
        "unsupported": ["thread"],
    }


def test_a_schema(make_client: MakeClient) -> None:
    client = make_client()
    form = {"type": "json_schema", "schema": {"type": "object"}}
    client.post(URL, json={**BODY, "output_config": {"format": form}})
    client.post(URL, json={**BODY, "output_format": form})
    grammars = [request.grammar for request in client.worker.served.engine.asked]
    assert grammars == [("json_schema", '{"type": "object"}')] * 2


def test_numbers_of_tokens(make_client: MakeClient) -> None:
    client = make_client()
    body = {"model": "fake-llama", "messages": USER, "system": "be kind"}
    counted = client.post(f"{URL}/count_tokens", json=body).get_json()
    client.post(URL, json={**body, "max_tokens": 1})
    assert counted == {"input_tokens": len(client.worker.served.engine.calls[0][0])}


BAD = [
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
    ({"model": "other"}, 404, "not_found_error", "'other' is not served here"),
    ({"messages": []}, 400, "invalid_request_error", "messages=[]"),
    ({"temperature": 1.5}, 400, "invalid_request_error", "temperature=1.5"),
    ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences.0"),
    ({"max_token": 3}, 400, "invalid_request_error", "did you mean 'max_tokens'"),
    ({"max_tokens": 51}, 400, "invalid_request_error", "at most 50 tokens"),
    ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "needs tools"),
    ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "a name go together"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "", "is not supported"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        400,
        "invalid_request_error",
        "block of type 'image': the model reads text only",
    ),
    ({"messages": [{"role": "robot", "content": "a"}]}, 400, "invalid_request_error", "messages"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "", "messages.0.user.content=[]"),
    (
        {"messages": [*USER, {"role": "assistant", "content": [USE]}]},
        400,
        "invalid_request_error",
        "the last one calls a tool; send what that gave (tool_result) behind it",
    ),
    ({"context_management": {"edits": [{"type": "x"}]}}, 400, "", "is not supported"),
    ({"speed": "fast"}, 400, "", "speed='fast': is not supported"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, 400, "", "defer_loading=True"),
]


@pytest.mark.parametrize(("fields", "status", "kind", "message"), BAD)
def test_errors_in_anthropics_shape(
    make_client: MakeClient, fields: Any, status: int, kind: str, message: str
) -> None:
    body = {name: value for name, value in {**BODY, **fields}.items() if value is not None}
    response = make_client().post(URL, json=body)
    found = response.get_json()
    assert (response.status_code, found["type"]) == (status, "error")
    assert found["error"]["type"] == (kind or "invalid_request_error")
    assert message in found["error"]["message"]


def test_an_error_within_a_stream(make_client: MakeClient) -> None:
    stream = events(make_client(make_served(fail_at=1)), BODY)
    assert stream[-1]["error"]["type"] == "api_error"


def test_the_key_in_anthropics_header(make_client: MakeClient) -> None:
    client = make_client(keys=Keys(single="sesame"))
    refused = client.post(URL, json=BODY)
    assert (refused.status_code, refused.get_json()["error"]["type"]) == (
        401,
        "authentication_error",
    )
    assert client.post(URL, json=BODY, headers={"x-api-key": "sesame"}).status_code == 200
