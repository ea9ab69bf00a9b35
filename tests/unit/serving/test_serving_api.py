"""The routes on a model that gives known answers."""

import json
from types import SimpleNamespace
from typing import Any

import paddle
import pytest
from fakes import BOS, FakeEngine, FakeHandle, FakeTokenizer, MakeClient, make_served
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

import common
from llm.engine.opening import OpenedModel
from llm.serving.keys import Keys

USER = [{"role": "user", "content": "hi"}]


def sse(response: TestResponse) -> list[Any]:
    """Return the events of a stream; ``[DONE]`` stays a string."""
    assert response.status_code == 200, response.get_data(as_text=True)
    assert response.mimetype == "text/event-stream"
    blocks = response.get_data(as_text=True).split("\n\n")
    assert blocks.pop() == ""
    payloads = [block.removeprefix("data: ") for block in blocks]
    return [p if p == "[DONE]" else json.loads(p) for p in payloads]


def chat(client: FlaskClient, **fields: Any) -> Any:
    response = client.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json()


def completion(client: FlaskClient, **fields: Any) -> Any:
    response = client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.get_json()


def test_chat(make_client: MakeClient) -> None:
    client = make_client()
    body = chat(client, model="fake-llama")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = FakeTokenizer().encode("<user>hi<assistant>", add_bos=True)
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 3,  # two words and the end token
        "total_tokens": len(prompt) + 3,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    (ids, params), *_ = client.worker.served.engine.calls
    assert ids == prompt
    assert params.max_new_tokens == 50, "the server's limit where nothing is asked for"
    assert (params.temperature, params.top_p, params.seed) == (1.0, 1.0, None)


def test_content_parts_and_the_developer_role(make_client: MakeClient) -> None:
    client = make_client()
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    chat(
        client,
        messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}],
    )
    (ids, _), *_ = client.worker.served.engine.calls
    assert FakeTokenizer().decode(ids) == "<system>be<user>hi<assistant>"


def test_chat_stream(make_client: MakeClient) -> None:
    client = make_client()
    events = sse(client.post("/v1/chat/completions", json={"messages": USER, "stream": True}))
    assert events.pop() == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)
    choices = [event["choices"][0] for event in events]
    assert [c["delta"] for c in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "hello"},
        {"content": " world"},
        {},
    ]
    assert [c["finish_reason"] for c in choices] == [None, None, None, "stop"]


def test_stream_usage(make_client: MakeClient) -> None:
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = sse(make_client().post("/v1/completions", json=body))
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    usage = last["usage"]
    assert [usage[f"{what}_tokens"] for what in ("prompt", "completion", "total")] == [3, 3, 6]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [("wor", "hello "), (["lo w", "zzz"], "hel"), ("ld", "hello wor"), ("ldx", "hello world")],
)
def test_stop_strings(make_client: MakeClient, stream: bool, stop: Any, expected: str) -> None:
    client = make_client(make_served(repeat=False))
    body = {"prompt": "hi", "stop": stop, "stream": stream}
    response = client.post("/v1/completions", json=body)
    if stream:
        *events, _ = sse(response)
        text = "".join(event["choices"][0]["text"] for event in events)
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.get_json()["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == (expected, "stop")


def test_a_stop_string_ends_the_generation(make_client: MakeClient) -> None:
    client = make_client(make_served("abcd", repeat=True, delay=0.01), max_length=100)
    assert completion(client, stop="dab", max_tokens=100)["choices"][0]["text"] == "abc"
    assert completion(client, max_tokens=1)["choices"][0]["text"] == "a"
    engine = client.worker.served.engine
    assert engine.steps < 20, "far fewer than the 100 that were allowed"
    assert engine.running == 0


def test_length_limit(make_client: MakeClient) -> None:
    client = make_client(make_served("ab", repeat=True))
    body = completion(client)
    assert len(body["choices"][0]["text"]) == 16, "OpenAI's default"
    assert body["choices"][0]["finish_reason"] == "length"
    assert chat(client, max_completion_tokens=7)["choices"][0]["message"]["content"] == "abababa"


def test_sampling_fields_reach_the_engine(make_client: MakeClient) -> None:
    client = make_client()
    chat(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        seed=3,
        repetition_penalty=1.5,
        ignore_eos=True,
        stop_token_ids=[5],
        max_tokens=9,
    )
    (_, params), *_ = client.worker.served.engine.calls
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 7, 3)
    assert (params.repetition_penalty, params.ignore_eos) == (1.5, True)
    assert (params.stop_ids, params.max_new_tokens) == ((5,), 9)


def test_neutral_values_of_openai_fields(make_client: MakeClient) -> None:
    body = chat(
        make_client(),
        user="me",
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        n=1,
        stop=None,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        top_logprobs=None,
        store=False,
        metadata={"a": "b"},
        stream_options=None,
    )
    assert body["choices"][0]["finish_reason"] == "stop"


def test_several_prompts_and_choices(make_client: MakeClient) -> None:
    client = make_client()
    body = completion(client, prompt=["a", "bb"], n=2, seed=10, echo=True)
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in body["choices"]] == [
        p + "hello world" for p in ("a", "a", "bb", "bb")
    ]
    assert body["usage"]["prompt_tokens"] == 2 + 3
    calls = client.worker.served.engine.calls
    assert [params.seed for _, params in calls] == [10] * 4
    assert client.worker.served.engine.choices == [0, 1, 0, 1]


def test_the_best_of_several(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four candidates the two whose tokens are likeliest in the mean; usage counts all."""
    shares, advance = (3.0, 1.0, 2.0, 0.5), FakeEngine._advance

    def differently(self: FakeEngine, handle: FakeHandle) -> None:
        advance(self, handle)
        token = handle.produced.pop()
        handle.produced.append(token._replace(logprob=-shares[handle.request.choice]))

    monkeypatch.setattr(FakeEngine, "_advance", differently)
    client = make_client()
    body = {"prompt": ["a", "b"], "n": 2, "best_of": 4, "logprobs": 0, "max_tokens": 3}
    answer = client.post("/v1/completions", json=body).get_json()
    assert [one["index"] for one in answer["choices"]] == [0, 1, 2, 3]
    found = [one["logprobs"]["token_logprobs"] for one in answer["choices"]]
    assert found == [[-0.5] * 3, [-1.0] * 3] * 2
    assert answer["usage"]["completion_tokens"] == 2 * 4 * 3, "end tokens too"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * 2
    assert sorted(client.worker.served.engine.choices) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_several_choices_streamed(make_client: MakeClient) -> None:
    client = make_client()
    response = client.post("/v1/chat/completions", json={"messages": USER, "n": 3, "stream": True})
    *events, _ = sse(response)
    for index in range(3):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in own) == "hello world"
        assert own[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("prompt", [[BOS, 10, 11], [[BOS, 10, 11], [BOS, 12]]])
def test_prompts_of_token_ids_are_taken_as_they_are(make_client: MakeClient, prompt: Any) -> None:
    client = make_client()
    completion(client, prompt=prompt)
    lists = prompt if isinstance(prompt[0], list) else [prompt]
    assert [ids for ids, _ in client.worker.served.engine.calls] == lists


def test_echo_streams_the_prompt_first(make_client: MakeClient) -> None:
    body = {"prompt": "say ", "echo": True, "stream": True}
    *events, _ = sse(make_client().post("/v1/completions", json=body))
    texts = [event["choices"][0]["text"] for event in events]
    assert texts == ["say ", "hello", " world", ""]


def test_logprobs(make_client: MakeClient) -> None:
    client = make_client()
    content = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [(t["token"], t["logprob"], bytes(t["bytes"])) for t in content] == [
        ("hello", -0.25, b"hello"),
        (" world", -0.5, b" world"),
    ]
    logprobs = completion(client, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["hello", " world", "</s>"],
        "token_logprobs": [-0.25, -0.5, -0.5],
        "top_logprobs": None,
        "text_offset": [0, 5, 11],
    }


def test_streamed_logprobs_equal_the_whole(make_client: MakeClient) -> None:
    client = make_client(make_served("hello 中 worldSTO"))
    fields = {"prompt": "x", "logprobs": 0, "stop": "STOP"}
    whole = completion(client, **fields)["choices"][0]["logprobs"]
    *events, _ = sse(client.post("/v1/completions", json={**fields, "stream": True}))
    parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    for key in ("tokens", "token_logprobs", "text_offset"):
        assert [v for part in parts for v in part[key]] == whole[key]


def generate(client: FlaskClient, **body: Any) -> TestResponse:
    return client.post("/generate", json={"inputs": "hi", **body})


def test_generate(make_client: MakeClient) -> None:
    client = make_client()
    assert generate(client).get_json() == {"generated_text": "hello world"}
    (_, params), *_ = client.worker.served.engine.calls
    assert params.temperature == 0.0, "greedy unless sampling is asked for"
    body = generate(client, parameters={"details": True, "return_full_text": True}).get_json()
    assert body["generated_text"] == "hihello world"
    assert body["details"]["finish_reason"] == "eos_token"
    assert body["details"]["generated_tokens"] == 3
    assert [t["text"] for t in body["details"]["tokens"]] == ["hello", " world", ""]
    assert [t["special"] for t in body["details"]["tokens"]] == [False, False, True]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"temperature": 0.7}, (0.7, 0, 1.0)),
        ({"do_sample": True}, (1.0, 0, 1.0)),
        ({"top_k": 5}, (1.0, 5, 1.0)),
        ({"top_p": 0.5}, (1.0, 0, 0.5)),
        ({"top_p": 1.0, "do_sample": False}, (0.0, 0, 1.0)),
    ],
)
def test_generate_sampling(make_client: MakeClient, parameters: Any, expected: Any) -> None:
    client = make_client()
    generate(client, parameters=parameters)
    (_, params), *_ = client.worker.served.engine.calls
    assert (params.temperature, params.top_k, params.top_p) == expected


def test_generate_truncates_from_the_left(make_client: MakeClient) -> None:
    client = make_client()
    generate(client, inputs="abcdef", parameters={"truncate": 2})
    (ids, _), *_ = client.worker.served.engine.calls
    assert ids == FakeTokenizer().encode("ef")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["wor"], "hello ", "stop_sequence"),
        ([" world"], "hello", "stop_sequence"),
        ([], "hello world", "eos_token"),
    ],
)
def test_generate_stream(make_client: MakeClient, stop: Any, text: str, reason: str) -> None:
    events = sse(generate(make_client(), stream=True, parameters={"stop": stop}))
    assert "".join(event["token"]["text"] for event in events) == text
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert all(event["generated_text"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == text
    assert events[-1]["details"]["finish_reason"] == reason


def test_models(make_client: MakeClient) -> None:
    client = make_client()
    listed = client.get("/v1/models").get_json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake-llama", "model", 200)
    assert client.get("/v1/models/fake-llama").get_json() == model
    assert client.get("/v1/models/other/one").status_code == 404


def test_an_adapter_is_a_model_of_its_own(make_client: MakeClient) -> None:
    served = make_served()
    served.model.runner.adapters = SimpleNamespace(names=("de", "team/fr"))
    client = make_client(served)
    listed = client.get("/v1/models").get_json()["data"]
    assert [one["id"] for one in listed] == ["fake-llama", "de", "team/fr"]
    assert [one.get("parent") for one in listed] == [None, "fake-llama", "fake-llama"]
    assert client.get("/v1/models/team/fr").get_json()["id"] == "team/fr"
    for name, answers in (("fake-llama", "fake-llama"), ("de", "de"), (None, "fake-llama")):
        given = {} if name is None else {"model": name}
        assert chat(client, **given)["model"] == completion(client, **given)["model"] == answers
    assert served.engine.named == [None, None, "de", "de", None, None]
    body = {"prompt": "hi", "model": "es"}
    error = client.post("/v1/completions", json=body).get_json()["error"]
    assert error["message"].endswith("this server has 'fake-llama', 'de', 'team/fr'")


def test_request_id(make_client: MakeClient) -> None:
    client = make_client()
    given = client.get("/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"]
    made = client.get("/health", headers={"X-Request-Id": "no spaces"}).headers["X-Request-Id"]
    assert given == "abc-1"
    assert len(made) == 32


def test_api_key(make_client: MakeClient) -> None:
    client = make_client(keys=Keys(single="sesame"))
    assert client.get("/health").status_code == 200
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer é"}):
        response = client.get("/v1/models", headers=header)
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert "--api_key" in response.get_json()["error"]["message"]
    good = client.get("/v1/models", headers={"Authorization": "Bearer sesame"})
    assert good.status_code == 200


def test_version_says_which_form_each_op_takes(make_client: MakeClient) -> None:
    served = make_served()
    model = OpenedModel("fake-llama", served.model.tokenizer, served.engine)
    client = make_client(served._replace(model=model))
    body = client.get("/version").get_json()
    assert body["version"] == common.__version__ and body["paddle"] == paddle.__version__
    assert body["model"] == "fake-llama"
    for row in body["ops"]:
        assert list(row) == ["op", "form", "level", "why"] and row["why"]
