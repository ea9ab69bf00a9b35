"""Fields of the OpenAI routes: what reaches the engine, and what answers tell of it."""

import json
from itertools import accumulate
from typing import Any

import pytest
from fakes import BOS, EOS, FakeEngine, FakeHandle, FakeTokenizer, MakeClient, make_served
from flask.testing import FlaskClient
from test_serving_api import USER, chat, completion, sse

from llm.engine.request import GrammarSpec, Request, Token
from llm.serving.off import ANYTHING, OFF
from llm.serving.openai.schema import ChatRequest, CompletionRequest
from llm.serving.requests import Event, Plan, Prompt, _scored

ROUTES = {"/v1/chat/completions": {"messages": USER}, "/v1/completions": {"prompt": "hi"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def asked(client: FlaskClient, path: str, **fields: Any) -> Any:
    """Return what a request hands to the engine."""
    engine = client.worker.served.engine
    response = client.post(path, json={**ROUTES[path], **fields})
    assert response.status_code == 200, response.get_data(as_text=True)
    return engine.asked[-1]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"presence_penalty": -1}, {"presence_penalty": -1}),
        ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": ((5, -100), (7, 1.5))}),
        ({"min_p": 0.1, "typical_p": 0.9}, {"min_p": 0.1, "typical_p": 0.9}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": 5.0, "top_k": 3.0}, {"seed": 5, "top_k": 3}),
        ({"max_tokens": 16.0}, {"max_new_tokens": 16}),
        ({"bad_words": ["hello"]}, {"bad_words": ((259,), (35, 259))}),
        ({"stop_token_ids": [9], "ignore_eos": True}, {"stop_ids": (9,), "ignore_eos": True}),
        ({"prompt_logprobs": 2}, {"prompt_logprobs": 2}),
    ],
)
def test_what_chooses_tokens(
    make_client: MakeClient, path: str, fields: Any, expected: Any
) -> None:
    params = asked(make_client(), path, **fields).params
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_object", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            ("json_schema", json.dumps(SCHEMA)),
        ),
        ({"guided_json": SCHEMA}, ("json_schema", json.dumps(SCHEMA))),
        ({"guided_json": json.dumps(SCHEMA)}, ("json_schema", json.dumps(SCHEMA))),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, ("choice", ("a", "b"))),
        ({"guided_grammar": 'root ::= "a"'}, ("gbnf", 'root ::= "a"')),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json_object": True}}, ("json_object", "")),
    ],
)
def test_what_holds_answers_to_a_form(
    make_client: MakeClient, path: str, fields: Any, expected: Any
) -> None:
    grammar = asked(make_client(), path, **fields).grammar
    assert grammar == (None if expected is None else GrammarSpec(*expected))


def test_priority(make_client: MakeClient) -> None:
    assert asked(make_client(), "/v1/completions", priority=-3).priority == -3


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", OFF)
def test_fields_of_other_servers(make_client: MakeClient, path: str, name: str) -> None:
    """Each passes at null and at what it is off with, and says so at anything else."""
    body = ChatRequest if "chat" in path else CompletionRequest
    if name in body.model_fields:
        pytest.skip("the route's own")
    client = make_client()
    free = OFF[name] is ANYTHING
    for value in (None, *(["x", 7] if free else OFF[name])):
        assert asked(client, path, **{name: value})
    if free:
        return
    for value in ("nonsense", 12345, [1], {"a": 1}):
        response = client.post(path, json={**ROUTES[path], name: value})
        error = response.get_json()["error"]
        assert (response.status_code, error["param"]) == (400, name)
        assert f"{name}=" in error["message"] and "is not supported" in error["message"]


def test_alternatives_to_tokens(make_client: MakeClient) -> None:
    """The chosen one among them is called as the chosen one; half a character by its bytes."""
    client = make_client()
    first = chat(client, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["bytes"]) == ("hello", list(b"hello"))
    assert [(one["token"], one["logprob"]) for one in first["top_logprobs"]] == [
        ("</s>", -0.125),
        ("hello", -0.25),
        ("bytes:\\xe4", -8.0),
    ]
    assert [one["bytes"] for one in first["top_logprobs"]] == [
        list(b"</s>"),
        list(b"hello"),
        [0xE4],
    ]
    shown = completion(client, logprobs=1)["choices"][0]["logprobs"]
    # As many as asked for, and the chosen one.
    assert shown["top_logprobs"][0] == {"</s>": -0.125, "hello": -0.25}
    assert shown["tokens"] == ["hello", " world", "</s>"]
    ids = completion(client, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert ids["tokens"] == ["token_id:259", "token_id:260", f"token_id:{EOS}"]
    assert list(ids["top_logprobs"][0]) == [f"token_id:{EOS}", "token_id:259"]


def test_a_chosen_token_is_called_alike_among_the_others(make_client: MakeClient) -> None:
    """Also where it adds no text yet, as lm-eval compares them by name."""
    shown = completion(make_client(make_served("中")), logprobs=2)["choices"][0]["logprobs"]
    assert shown["tokens"] == ["", "", "中", "</s>"]
    for name, top in zip(shown["tokens"], shown["top_logprobs"], strict=True):
        assert set(top) == {"</s>", name}


def test_scores_wait_for_the_answer_that_brings_them() -> None:
    """Other answers to the prompt may be ahead of the first one; other prompts' do not wait."""
    plan = Plan([Prompt([1, 2], None, (), 4)] * 2, {"prompt_logprobs": 0}, n=2)
    score = Token(2, -1.0)
    events = [
        Event(1, [], None, 0, 1),
        Event(2, [], None, 0, 1, prompt=(score, score)),
        Event(0, [], None, 0, 1, prompt=(score,)),
        Event(1, [], None, 0, 2),
    ]
    found = [(event.index, len(event.prompt)) for event in _scored(plan, iter(events))]
    assert found == [(2, 2), (1, 1), (0, 1), (1, 1)]


def test_a_prompts_cached_tokens_count_once(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first answer has found them: later ones find what it has computed."""
    add = FakeEngine.add

    def found(self: FakeEngine, request: Request) -> FakeHandle:
        handle = add(self, request)
        handle.num_cached = 1 + 10 * request.choice
        return handle

    monkeypatch.setattr(FakeEngine, "add", found)
    usage = completion(make_client(), prompt=["a", "b"], n=3)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2


@pytest.mark.parametrize("n", [1, 3])
def test_scores_of_the_prompt(make_client: MakeClient, n: int) -> None:
    """As lm-eval's local-completions reads them: each token has an entry, the first no score."""
    client = make_client()
    body = {"prompt": "中hello", "echo": True, "logprobs": 1, "max_tokens": 1, "n": n}
    answer = completion(client, **body)
    ids = FakeTokenizer().encode("中hello", add_bos=True)
    for choice in answer["choices"]:
        assert choice["text"] == "中hellohello"
        shown = choice["logprobs"]
        assert shown["tokens"] == ["<s>", "", "", "中", "hello", "hello"]
        assert shown["token_logprobs"] == [None, *(-float(one) for one in ids[1:]), -0.25]
        assert shown["top_logprobs"][0] is None and len(shown["top_logprobs"]) == 6
        assert shown["text_offset"] == [0, 0, 0, 0, 1, 6]
    requests = client.worker.served.engine.asked
    assert [one.params.prompt_logprobs for one in requests] == [1] + [None] * (n - 1)
    *events, _ = sse(client.post("/v1/completions", json={**body, "stream": True}))
    for index in range(n):
        parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["index"] == index]
        for key, values in answer["choices"][index]["logprobs"].items():
            assert [one for part in parts if part for one in part[key]] == values


def test_a_prompt_alone(make_client: MakeClient) -> None:
    """``max_tokens: 0`` scores it, and the answer is empty; the first token's score is none."""
    client = make_client()
    body = completion(client, prompt=[BOS, 259], echo=True, logprobs=0, max_tokens=0)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -259.0]
    assert body["usage"]["completion_tokens"] == 0
    best = completion(client, max_tokens=0, n=1, best_of=2)
    assert best["choices"][0]["text"] == ""


def test_prompt_logprobs_in_vllms_shape(make_client: MakeClient) -> None:
    client = make_client()
    text = completion(client, prompt=[BOS, 259], prompt_logprobs=1)["choices"][0]
    first, second = text["prompt_logprobs"]
    assert first is None
    assert second == {
        "259": {"logprob": -259.0, "rank": None, "decoded_token": "hello"},
        str(EOS): {"logprob": -0.125, "rank": 1, "decoded_token": "</s>"},
    }
    whole = chat(client, prompt_logprobs=0)
    assert whole["prompt_logprobs"][0] is None and "prompt_logprobs" not in whole["choices"][0]
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in chat(client)


def test_usage_in_every_chunk(make_client: MakeClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "hi", "n": 2, "stream": True, "stream_options": options}
    *chunks, last, _ = sse(make_client().post("/v1/completions", json=body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 6
    assert last["usage"]["completion_tokens"] == 6 and last["choices"] == []
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}


def test_ends_that_are_kept(make_client: MakeClient) -> None:
    client = make_client(make_served("hello world and more"))
    kept = completion(client, stop="wor", include_stop_str_in_output=True)["choices"][0]
    assert (kept["text"], kept["finish_reason"]) == ("hello wor", "stop")
    fields = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert completion(client, max_tokens=20, **fields)["choices"][0]["text"] == (
        "hello world and more</s>"
    )
    shown = completion(client, max_tokens=20, skip_special_tokens=False)["choices"][0]["text"]
    assert shown == "hello world and more"


def test_a_last_message_that_goes_on(make_client: MakeClient) -> None:
    client = make_client()
    messages = [*USER, {"role": "assistant", "content": "hello"}]
    request = asked(client, "/v1/chat/completions", messages=messages, continue_final_message=True)
    assert FakeTokenizer().decode(request.prompt_ids) == "<user>hi<assistant>hello"
    request = asked(client, "/v1/chat/completions", add_generation_prompt=False)
    assert FakeTokenizer().decode(request.prompt_ids) == "<user>hi"


def test_offsets_are_where_texts_begin(make_client: MakeClient) -> None:
    shown = completion(make_client(), logprobs=0, max_tokens=2)["choices"][0]["logprobs"]
    ends = list(accumulate(len(one) for one in shown["tokens"]))
    assert shown["text_offset"] == [0, *ends[:-1]]
