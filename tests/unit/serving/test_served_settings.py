"""Flags of the server that only change how requests share a step: they reach the engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from fakes import make_served

from common.errors import UserError
from common.flags import load
from llm.config.scripts import SCRIPTS
from llm.engine.opening import OpenedModel
from llm.serving import service


def test_the_limits_of_a_step_reach_the_engine(monkeypatch):
    asked: dict[str, Any] = {}

    def open_engine(max_sequences: int, max_tokens: int, **options: Any) -> Any:
        asked.update(options, max_sequences=max_sequences, max_tokens=max_tokens)
        return SimpleNamespace(generate=lambda _: [], max_model_len=max_tokens)

    model = SimpleNamespace(name="served", adapter_names=(), context=500, open_engine=open_engine)
    monkeypatch.setattr(service, "open_model", lambda *_: model)
    words = "--no_ui --max_num_seqs 3 --max_num_batched_tokens 70 --src_length 20 --max_length 5"
    server, place = load(SCRIPTS["server.py"], words.split(), prog="server.py")
    assert service.open_served(place, None, server).model is model
    assert asked.pop("usual_tokens") > 0
    assert asked == {"max_sequences": 3, "max_tokens": 25, "max_step_tokens": 70}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "'tgi' is what clients send where nobody has set a model"),
        (["--strict_model_name"], None),
        (["--strict_model_name", "--model_alias", "tgi"], "is the name of an adapter"),
        (["--strict_model_name", "--model_id", "tgi"], "is the model's own name"),
    ],
)
def test_an_adapter_has_no_name_that_means_the_model(monkeypatch, flags, message):
    network = SimpleNamespace(generate=lambda _: [], max_model_len=50)
    model = OpenedModel("served", None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(OpenedModel, "adapter_names", ("tgi",))
    monkeypatch.setattr(OpenedModel, "context", 50)
    monkeypatch.setattr(OpenedModel, "open_engine", lambda *_, **__: network)
    monkeypatch.setattr(service, "open_model", lambda *_: model)
    server, place = load(SCRIPTS["server.py"], ["--no_ui", *flags], prog="server.py")
    found = SimpleNamespace(manifest=None)
    if message is None:
        assert service.open_served(place, found, server).engine is network
    else:
        with pytest.raises(UserError, match=message):
            service.open_served(place, found, server)


@pytest.mark.parametrize(
    ("flags", "context", "held", "named"),
    [
        ("", 500, 500, "the model's context"),
        ("", 5000, 1536, "the model's context"),
        ("--max_model_len 100", 500, 100, "--max_model_len"),
        ("--cache_blocks 2 --max_model_len 100", 500, 32, "--cache_blocks"),
    ],
)
def test_messages_name_what_sets_the_longest_request(
    monkeypatch, make_client, flags, context, held, named
):
    server, place = load(SCRIPTS["server.py"], ["--no_ui", *flags.split()], prog="server.py")
    fake = make_served(max_model_len=held)
    monkeypatch.setattr(fake.engine, "generate", lambda _: [], raising=False)
    model = SimpleNamespace(
        name="x", adapter_names=(), context=context, open_engine=lambda *_, **__: fake.engine
    )
    monkeypatch.setattr(service, "open_model", lambda *_: model)
    loaded = service.open_served(place, None, server)._replace(model=fake.model)
    client = make_client(loaded, src_length=1024, max_length=512)
    for body in ({"prompt": [5] * held}, {"prompt": [5] * (held - 2), "max_tokens": 3}):
        response = client.post("/v1/completions", json=body)
        message = response.get_json()["error"]["message"]
        long = len(body["prompt"]) > 1024
        assert response.status_code == 400
        assert ("--src_length" if long else f"({named})") in message
