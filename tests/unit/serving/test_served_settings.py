"""Flags of the server that only change how requests share a step: they reach the engine."""

from types import SimpleNamespace
from typing import Any

from common.flags import load
from llm.config.scripts import SCRIPTS
from llm.serving import service


def test_the_limits_of_a_step_reach_the_engine(monkeypatch):
    asked: dict[str, Any] = {}

    def open_engine(max_sequences: int, max_tokens: int, **options: Any) -> Any:
        asked.update(options, max_sequences=max_sequences, max_tokens=max_tokens)
        return SimpleNamespace(generate=lambda _: [])

    model = SimpleNamespace(name="served", adapter_names=(), context=500, open_engine=open_engine)
    monkeypatch.setattr(service, "open_model", lambda *_: model)
    words = "--no_ui --max_num_seqs 3 --max_num_batched_tokens 70 --src_length 20 --max_length 5"
    server, place = load(SCRIPTS["server.py"], words.split(), prog="server.py")
    assert service.open_served(place, None, server).model is model
    assert asked.pop("usual_tokens") > 0
    assert asked == {"max_sequences": 3, "max_tokens": 25, "max_step_tokens": 70}
