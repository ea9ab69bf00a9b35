"""What text is to the model, in vLLM's shapes; and names by which clients ask for a model."""

from typing import Any

import pytest
from fakes import BOS, EOS, FakeTokenizer, MakeClient, make_served

from llm.serving.absent import _WHY
from llm.serving.web import ANY_MODEL

USER = [{"role": "user", "content": "hi"}]
PROMPT = {"prompt": "hello wö"}


def test_a_text(make_client: MakeClient) -> None:
    client = make_client()
    found = client.post("/tokenize", json=PROMPT).get_json()
    ids = FakeTokenizer().encode("hello wö", add_bos=True)
    assert found == {"count": len(ids), "max_model_len": 200, "tokens": ids, "token_strs": None}
    bare = client.post("/tokenize", json={**PROMPT, "add_special_tokens": False}).get_json()
    assert bare["tokens"] == ids[1:]
    client.post("/v1/completions", json=PROMPT)
    assert client.worker.served.engine.calls[0][0] == ids, "as the completions route sees it"
    back = client.post("/detokenize", json={"tokens": ids}).get_json()
    assert back == {"prompt": "<s>hello wö"}


def test_a_server_that_adds_no_bos(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTokenizer, "adds_bos", False)
    client, plain = make_client(), FakeTokenizer().encode("hello wö")
    calls = client.worker.served.engine.calls
    for said, ids in ((None, plain), (False, plain), (True, [BOS, *plain])):
        body = PROMPT if said is None else {**PROMPT, "add_special_tokens": said}
        assert client.post("/tokenize", json=body).get_json()["tokens"] == ids
        client.post("/v1/completions", json=body)
        assert calls[-1][0] == ids
    refused = client.post("/v1/completions", json={"prompt": ""})
    assert refused.status_code == 400
    assert "no beginning-of-sequence token stands before" in refused.get_json()["error"]["message"]


def test_texts_of_tokens(make_client: MakeClient) -> None:
    body = {**PROMPT, "return_token_strs": True}
    texts = make_client().post("/tokenize", json=body).get_json()["token_strs"]
    assert texts == ["<s>", "hello", " ", "w", "\ufffd", "\ufffd"]


def test_a_control_token_alone_is_itself(make_client: MakeClient) -> None:
    client = make_client()

    def tokens(prompt: str) -> list[int]:
        body = {"prompt": prompt, "add_special_tokens": False}
        found: list[int] = client.post("/tokenize", json=body).get_json()["tokens"]
        return found

    assert tokens("</s>") == [EOS]
    assert tokens("a</s>") == FakeTokenizer().encode("a</s>")
    assert tokens("") == []


def test_a_conversation(make_client: MakeClient) -> None:
    client = make_client()
    found = client.post("/tokenize", json={"messages": USER}).get_json()
    client.post("/v1/chat/completions", json={"messages": USER})
    assert found["tokens"] == client.worker.served.engine.calls[0][0]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "send either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "send either prompt or messages"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools only goes with messages"),
        ("/tokenize", {"messages": USER, "add_special_tokens": True}, "leave add_special_tokens"),
        ("/tokenize", {"prompt": "a", "promt": "b"}, "did you mean 'prompt'"),
        ("/tokenize", {"messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "'other' is not served here"),
        ("/detokenize", {"tokens": [300]}, "token id 300, but this model's ids go from 0 to 260"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0='a'"),
    ],
)
def test_bad_bodies(make_client: MakeClient, path: str, body: Any, message: str) -> None:
    response = make_client().post(path, json=body)
    assert response.status_code in (400, 404)
    assert message in response.get_json()["error"]["message"]


def test_info(make_client: MakeClient) -> None:
    found = make_client().get("/tokenizer_info").get_json()
    assert found["eos_token"] == "</s>"
    assert found["chat_template"] == FakeTokenizer().chat_template


@pytest.mark.parametrize("name", [*ANY_MODEL, "gpt-x", "fake-llama"])
def test_names_of_the_model(make_client: MakeClient, name: str) -> None:
    body = {**PROMPT, "model": name}
    client = make_client(aliases=("gpt-x",))
    assert client.post("/v1/completions", json=body).get_json()["model"] == "fake-llama"
    assert client.worker.served.engine.named == [None], "no adapter of that name"
    strict = make_client(aliases=("gpt-x",), any_names=())
    status = strict.post("/v1/completions", json=body).status_code
    assert status == (404 if name in ANY_MODEL else 200)


def test_aliases_are_listed(make_client: MakeClient) -> None:
    client = make_client(aliases=("gpt-x",))
    listed = client.get("/v1/models").get_json()["data"]
    assert [one["id"] for one in listed] == ["fake-llama", "gpt-x"]
    assert all("parent" not in one for one in listed)
    assert client.get("/v1/models/gpt-x").get_json()["id"] == "gpt-x"


@pytest.mark.parametrize("begin", _WHY)
def test_absent_routes_say_why(make_client: MakeClient, begin: str) -> None:
    response = make_client().post(begin + ("x" if begin.endswith("/") else ""), json={})
    assert response.status_code == 404
    assert _WHY[begin] in response.get_json()["error"]["message"]


def test_a_padded_vocabulary(make_client: MakeClient) -> None:
    served = make_served()
    model = served.model
    assert model.tokenizer.vocab_size <= model.vocab_size
    tokens = [BOS, model.vocab_size - 1]
    assert make_client(served).post("/detokenize", json={"tokens": tokens}).status_code == 200
