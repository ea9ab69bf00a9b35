"""Bad requests: status, message, and the field that the error names."""

import json
import logging
from typing import Any

import pytest
from fakes import FakeTokenizer, MakeClient, make_served

from common.errors import DataError
from llm.engine.request import BrokenLogitsError

USER = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LONG = "x" * 150
DEEP: Any = {}
for _ in range(31):
    DEEP = {"properties": {"a": DEEP}}
DEEP_CALL = {"function": {"name": "f", "arguments": '{"a":' * 900 + "1" + "}" * 900}}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"properties": {"a": {"type": "foo"}}}},
}

# (route, body, status, param, part of the message)
CASES: list[tuple[str, Any, int, str | None, str]] = [
    (CHAT, {}, 400, "messages", "messages is missing; it is required"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
    (CHAT, {"messages": "hi"}, 400, "messages", "messages='hi'"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content", "is missing"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "'robot'"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content", "a string"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": None}]},
        400,
        "messages.0.content",
        "a string",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages.0.content",
        "type 'image_url', but this model reads text only",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "messages.0.content.0.text",
        "messages.0.content.0.text is missing",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "x"}]},
        400,
        "messages",
        "the template wants the last message to be the user's",
    ),
    (CHAT, {"messages": USER, "model": "gpt-4"}, 404, "model", "'gpt-4' is not served here"),
    (CHAT, {"messages": USER, "topp": 1}, 400, "topp", "did you mean 'top_p'?"),
    # Suggestions are of this route and lead to the right place.
    (TEXT, {"prompt": "x", "max_new_tokens": 1}, 400, "max_new_tokens", "mean 'max_tokens'?"),
    (TEXT, {"prompt": "x", "watermrk": 1}, 400, "watermrk", "docs/serving.md lists"),
    (
        CHAT,
        {"messages": [{**USER[0], "temperature": 1}]},
        400,
        "messages.0.temperature",
        "did you mean 'temperature' of the body itself?",
    ),
    (CHAT, {"messages": USER, "zzz": 1}, 400, "zzz", "unknown field 'zzz'"),
    (CHAT, {"messages": USER, "temperature": "hot"}, 400, "temperature", "temperature='hot'"),
    (CHAT, {"messages": USER, "temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
    (CHAT, {"messages": USER, "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    (CHAT, {"messages": USER, "top_p": 0}, 400, "top_p", "greater than 0"),
    (CHAT, {"messages": USER, "top_p": 1.5}, 400, "top_p", "less than or equal to 1"),
    (CHAT, {"messages": USER, "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    (CHAT, {"messages": USER, "max_tokens": True}, 400, "max_tokens", "valid integer"),
    (CHAT, {"messages": USER, "max_tokens": 1.5}, 400, "max_tokens", "valid integer"),
    (CHAT, {"messages": USER, "max_tokens": 51}, 400, "max_tokens", "at most 50 tokens"),
    (
        CHAT,
        {"messages": USER, "max_completion_tokens": 51},
        400,
        "max_completion_tokens",
        "max_completion_tokens=51, but this server answers with at most 50",
    ),
    (
        CHAT,
        {"messages": USER, "max_tokens": 1, "max_completion_tokens": 2},
        400,
        "max_tokens",
        "max_tokens=1 and max_completion_tokens=2 contradict",
    ),
    (CHAT, {"messages": USER, "n": 0}, 400, "n", "greater than or equal to 1"),
    (CHAT, {"messages": USER, "n": 65}, 400, "n", "less than or equal to 64"),
    (CHAT, {"messages": USER, "stop": [""]}, 400, "stop.0", "at least 1 character"),
    (CHAT, {"messages": USER, "stop": ["x"] * 17}, 400, "stop", "at most 16"),
    (CHAT, {"messages": USER, "stop": 7}, 400, "stop", "stop=7"),
    (CHAT, {"messages": USER, "stream": "yes"}, 400, "stream", "valid boolean"),
    (
        CHAT,
        {"messages": USER, "stream_options": {"include_usage": True}},
        400,
        "stream_options",
        "only goes with stream: true",
    ),
    (CHAT, {"messages": USER, "stop_token_ids": [999]}, 400, "stop_token_ids", "go from 0 to 260"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": LONG}]},
        400,
        "messages",
        "messages has 168 tokens, but the limit is 100 (--src_length); shorten it",
    ),
    (CHAT, {"messages": USER, "seed": -2}, 400, "seed", "greater than or equal to 0"),
    (CHAT, {"messages": USER, "frequency_penalty": 2.5}, 400, "frequency_penalty", "equal to 2"),
    (CHAT, {"messages": USER, "logit_bias": {"999": 1}}, 400, "logit_bias", "go from 0 to 260"),
    (CHAT, {"messages": USER, "logit_bias": {"a": 1}}, 400, "logit_bias", "no token id"),
    (CHAT, {"messages": USER, "logit_bias": {"5": 101}}, 400, "logit_bias.5", "equal to 100"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "to 20"),
    (CHAT, {"messages": USER, "top_logprobs": 3}, 400, "top_logprobs", "goes with logprobs: true"),
    (CHAT, {"messages": USER, "bad_words": [""]}, 400, "bad_words.0", "at least 1 character"),
    (CHAT, {"messages": USER, "typical_p": 0}, 400, "typical_p", "greater than 0"),
    (CHAT, {"messages": USER, "min_p": 2}, 400, "min_p", "less than or equal to 1"),
    (CHAT, {"messages": USER, "priority": 0.5}, 400, "priority", "valid integer"),
    (CHAT, {"messages": USER, "functions": [{}]}, 400, "functions", "send them as tools"),
    (CHAT, {"messages": USER, "min_tokens": False}, 400, "min_tokens", "send null or 0"),
    (
        CHAT,
        {"messages": USER, "prompt_logprobs": 1, "stream": True},
        400,
        "prompt_logprobs",
        "drop stream, or use echo with logprobs",
    ),
    (CHAT, {"messages": USER, "guided_regex": "(("}, 400, "guided_regex", "cannot be followed"),
    (
        CHAT,
        {"messages": USER, "guided_regex": "a", "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "guided_regex and response_format each hold the answer to a form",
    ),
    (
        CHAT,
        {"messages": USER, "response_format": {"type": "json_schema"}},
        400,
        "response_format",
        "go together",
    ),
    (
        CHAT,
        {"messages": USER, "guided_json": {"type": "foo"}},
        400,
        "guided_json",
        "Invalid type: foo",
    ),
    (
        CHAT,
        {"messages": USER, "guided_json": {"enum": ["x" * 70_000]}},
        400,
        "guided_json",
        "characters, but the limit is 65536; send less",
    ),
    (CHAT, {"messages": USER, "guided_json": DEEP}, 400, "guided_json", "more than 60 deep"),
    (
        CHAT,
        {"messages": USER, "guided_regex": "a", "ignore_eos": True},
        400,
        "ignore_eos",
        "a grammar says where that is",
    ),
    (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"tools": []}},
        400,
        "chat_template_kwargs.tools",
        "send tools as a field of the body itself",
    ),
    (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"thinking": True}},
        400,
        "chat_template_kwargs.thinking",
        "this model's chat template knows no thinking; leave it out",
    ),
    (
        CHAT,
        {"messages": USER, "continue_final_message": True},
        400,
        "continue_final_message",
        "needs a last message of the assistant",
    ),
    (
        CHAT,
        {"messages": [*USER, {"role": "tool", "content": "5"}]},
        400,
        "messages.1.tool_call_id",
        "belongs to every message of role tool",
    ),
    (CHAT, {"messages": USER, "tool_choice": "required"}, 400, "tools", "needs tools"),
    (
        CHAT,
        {"messages": [*USER, {"role": "assistant", "tool_calls": [DEEP_CALL]}]},
        400,
        "messages.1.tool_calls.0.function.arguments",
        "more than 60 deep in each other; flatten them",
    ),
    (CHAT, {"messages": USER, "tools": [{"type": "retrieval"}]}, 400, "tools.0.type", "'function'"),
    (CHAT, {"messages": USER, "tools": [TOOL, TOOL]}, 400, "tools", "two tools called 'f'"),
    (CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "f"}, 400, "tool_choice", '"auto"'),
    (
        CHAT,
        {
            "messages": USER,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
        400,
        "tool_choice",
        "names 'g', which is not among the tools (f)",
    ),
    (
        CHAT,
        {"messages": USER, "tools": [BAD_TOOL], "tool_choice": "required"},
        400,
        "tools.0.function.parameters",
        "Invalid type: foo",
    ),
    (TEXT, {"prompt": "x", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix", "continues a text and fills no gaps"),
    (TEXT, {"prompt": "x", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
    (TEXT, {}, 400, "prompt", "prompt is missing"),
    (TEXT, {"prompt": []}, 400, "prompt", "not empty"),
    (TEXT, {"prompt": [[]]}, 400, "prompt", "item 0 is neither"),
    (TEXT, {"prompt": ["a", 5]}, 400, "prompt", "item 1 is neither"),
    (TEXT, {"prompt": {"a": 1}}, 400, "prompt", "has to be a string"),
    (
        TEXT,
        {"prompt": [1, 999]},
        400,
        "prompt",
        "token id 999, but this model's ids go from 0 to 260",
    ),
    (TEXT, {"prompt": [[1], [-1]]}, 400, "prompt.1", "token id -1"),
    (TEXT, {"prompt": "x" * 100}, 400, "prompt", "prompt has 101 tokens, but the limit is 100"),
    (TEXT, {"prompt": ["x", LONG]}, 400, "prompt.1", "prompt.1 has 151 tokens"),
    (TEXT, {"prompt": ["x"] * 65}, 400, "prompt", "65 prompts, but the limit is 64"),
    (TEXT, {"prompt": ["x"] * 40, "n": 2}, 400, "n", "40 prompts times n=2"),
    (TEXT, {"prompt": "x", "best_of": 1, "n": 2}, 400, "best_of", "n=2 of them are kept; raise it"),
    (TEXT, {"prompt": "x", "best_of": 3, "stream": True}, 400, "best_of", "drop stream, or"),
    (TEXT, {"prompt": ["x"] * 9, "best_of": 9}, 400, "best_of", "9 prompts times best_of=9"),
    (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix", "is not supported"),
    (TEXT, {"prompt": "\ud800"}, 400, None, "not valid JSON"),
]


@pytest.mark.parametrize(("route", "body", "status", "param", "message"), CASES)
def test_bad_body(
    make_client: MakeClient, route: str, body: Any, status: int, param: str | None, message: str
) -> None:
    client = make_client()
    response = client.post(route, json=body)
    error = response.get_json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert client.worker.served.engine.calls == [], "refused before the engine is asked"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "more than 100 deep in each other"),
        (b"[]", "has to be a JSON object, not list"),
        (b'"hi"', "has to be a JSON object, not str"),
    ],
)
def test_bad_json(make_client: MakeClient, data: bytes, message: str) -> None:
    response = make_client().post(CHAT, data=data, content_type="application/json")
    assert response.status_code == 400
    assert message in response.get_json()["error"]["message"]
    assert response.get_json()["error"]["code"] == "invalid_json"


def test_json_at_the_limit_of_depth_is_read(make_client: MakeClient) -> None:
    data = b'{"a":' * 100 + b"1" + b"}" * 100
    response = make_client().post(CHAT, data=data, content_type="application/json")
    assert response.get_json()["error"]["code"] == "missing"  # of a body that has no messages


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_wrong_content_type(make_client: MakeClient, content_type: str) -> None:
    data = json.dumps({"messages": USER})
    response = make_client().post(CHAT, data=data, content_type=content_type)
    assert response.status_code == 415
    assert "send application/json" in response.get_json()["error"]["message"]


def test_body_too_large(make_client: MakeClient) -> None:
    response = make_client(max_body_bytes=1024).post(TEXT, json={"prompt": "x" * 2000})
    assert response.status_code == 413
    message = response.get_json()["error"]["message"]
    assert "2014 bytes" in message and "1024 bytes (--max_body_bytes)" in message


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nowhere", 404, "there is no /nowhere; this server has /v1/chat/completions"),
        ("GET", CHAT, 405, "does not take GET; use POST"),
        ("POST", "/v1/models", 405, "does not take POST"),
    ],
)
def test_wrong_route(
    make_client: MakeClient, method: str, path: str, status: int, message: str
) -> None:
    response = make_client().open(path, method=method)
    assert response.status_code == status
    assert message in response.get_json()["error"]["message"]
    assert response.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "inputs is missing"),
        ({"inputs": 5}, "inputs=5"),
        ({"inputs": ["a"]}, "inputs=['a']"),
        ({"inputs": LONG}, "inputs has 151 tokens, but the limit is 100"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 51}}, "parameters.max_new_tokens=51"),
        ({"inputs": "x", "parameters": {"temperature": 0}}, "greater than 0"),
        ({"inputs": "x", "parameters": {"max_tokens": 5}}, "did you mean 'max_new_tokens'"),
        ({"inputs": "x", "max_new_tokens": 5}, "did you mean 'parameters.max_new_tokens'"),
        ({"inputs": "x", "parameters": {"watermark": True}}, "is not supported"),
        ({"inputs": "x", "parameters": {"top_n_tokens": 21}}, "parameters.top_n_tokens=21"),
        ({"inputs": "x", "parameters": {"best_of": 65}}, "parameters.best_of=65"),
    ],
)
def test_generate_errors_have_tgi_shape(make_client: MakeClient, body: Any, message: str) -> None:
    response = make_client().post("/generate", json=body)
    assert response.status_code == 400
    assert message in response.get_json()["error"]
    assert response.get_json()["error_type"] == "validation"


def test_prompt_and_answer_have_to_fit_the_context(make_client: MakeClient) -> None:
    client = make_client(make_served(max_model_len=60))
    body = {"prompt": "x" * 29, "max_tokens": 31}
    error = client.post(TEXT, json=body).get_json()["error"]
    assert "prompt has 30 tokens and max_tokens=31" in error["message"]
    assert "more than 60 (the model's context); ask for at most 30" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert client.post(TEXT, json={**body, "max_tokens": 30}).status_code == 200
    # Without max_tokens the answer takes the room there is.
    assert client.post(TEXT, json={"prompt": "x" * 55}).status_code == 200
    assert client.worker.served.engine.calls[-1][1].max_new_tokens == 4
    assert client.post(TEXT, json={"prompt": "x" * 59}).status_code == 400


def test_no_chat_template(make_client: MakeClient) -> None:
    client = make_client(make_served(tokenizer=FakeTokenizer(chat_template=None)))
    error = client.post(CHAT, json={"messages": USER}).get_json()["error"]
    assert "has no chat template; use /v1/completions" in error["message"]


def test_empty_prompt_without_a_first_token(make_client: MakeClient) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.bos_id = None
    client = make_client(make_served(tokenizer=tokenizer))
    error = client.post(TEXT, json={"prompt": ""}).get_json()["error"]
    assert "prompt is empty" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": "x"}),
        ("/generate", {"inputs": "x"}),
        (CHAT, {"messages": USER}),
    ],
)
def test_a_text_that_the_tokenizer_cannot_encode(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    def broken(*_: Any, **__: Any) -> list[int]:
        raise DataError("the library cannot encode a text of 1 characters, 'x': panic")

    client = make_client()
    for name in ("encode", "apply_chat_template"):
        monkeypatch.setattr(FakeTokenizer, name, broken)
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert "cannot encode a text of 1 characters" in response.get_data(as_text=True)


@pytest.mark.parametrize("stream", [False, True])
def test_engine_failure(
    make_client: MakeClient, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(make_served(fail_at=0))
    with caplog.at_level(logging.ERROR):
        response = client.post(TEXT, json={"prompt": "x", "stream": stream})
    assert response.status_code == 500
    error = response.get_json()["error"]
    assert "RuntimeError: a kernel broke" in error["message"]
    assert error["type"] == "server_error"
    assert "a kernel broke" in caplog.text, "the log has the traceback"
    client.worker.served.engine.fail_at = None
    assert client.post(TEXT, json={"prompt": "x"}).status_code == 200, "the next request works"


@pytest.mark.parametrize("path", [TEXT, CHAT, "/generate"])
def test_broken_logits_are_the_servers_fault(make_client: MakeClient, path: str) -> None:
    """Status 500, and a body without NaN, which is no JSON."""
    client = make_client(make_served(fail_at=0, failure=BrokenLogitsError))
    bodies = {
        TEXT: {"prompt": "x"},
        CHAT: {"messages": USER, "logprobs": True},
        "/generate": {"inputs": "x", "parameters": {"details": True}},
    }
    response = client.post(path, json=bodies[path])
    assert response.status_code == 500
    body = response.get_data(as_text=True)
    assert "NaN" not in body and "logits hold nan or inf" in str(json.loads(body)["error"])


def test_what_the_engine_refuses_is_a_bad_request(make_client: MakeClient) -> None:
    client = make_client(make_served(refuses=2))
    response = client.post(TEXT, json={"prompt": "x"})
    assert response.status_code == 400
    assert response.get_json()["error"]["message"] == "no blocks for that"


def test_engine_failure_in_the_middle_of_a_stream(make_client: MakeClient) -> None:
    client = make_client(make_served(fail_at=1))
    response = client.post(TEXT, json={"prompt": "x", "stream": True})
    *_, text, error, done, end = response.get_data(as_text=True).split("\n\n")
    assert json.loads(text.removeprefix("data: "))["choices"][0]["text"] == "hello"
    assert "a kernel broke" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert (done, end) == ("data: [DONE]", "")
