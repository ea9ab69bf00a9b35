"""Adapters of a real network that come and go over HTTP while others' answers run."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTokenizer, LocalWorker
from flask.testing import FlaskClient

from llm.engine.engine import Engine
from llm.engine.opening import OpenedModel
from llm.engine.request import Request
from llm.engine.runners import DygraphRunner
from llm.llama.adapters.lora import LoRAConfig, save_lora
from llm.llama.adapters.prefix import save_prefix
from llm.llama.fused import pack
from llm.serving.api import create_app
from llm.serving.management import create_management_app
from llm.serving.metrics import Metrics
from llm.serving.openai import routes
from llm.serving.requests import Limits
from llm.serving.steps import Loaded
from llm.serving.web import ApiSettings
from tests.unit.llama.adapters.adapter_models import base, with_lora, with_prefix

IDS = [5, 9, 2, 7, 7, 3]


def opened() -> Loaded:
    network = pack(base(to_pack=True))
    runner = DygraphRunner(network, block_size=8)
    model = OpenedModel("tiny", FakeTokenizer(), runner, network)
    engine = Engine(runner, max_sequences=4, max_tokens=100, num_blocks=100)
    return Loaded(model, engine)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRA adapters and a tuned prefix."""
    place = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("de", "fr")):
        save_lora(with_lora(config=LoRAConfig(r=3, lora_alpha=6), seed=seed), place / name)
    save_prefix(with_prefix(5, seed=2), place / "short")
    return place


@pytest.fixture
def clients(root: Path) -> Iterator[tuple[FlaskClient, FlaskClient]]:
    worker = LocalWorker(opened, 8)
    worker.start()
    worker.wait_loaded()
    settings, metrics = ApiSettings(Limits(40, 60)), Metrics(worker)
    yield (
        create_app(worker, settings, metrics, shows_metrics=False).test_client(),
        create_management_app(worker, settings, metrics, root).test_client(),
    )
    worker.close()


def ask(client: FlaskClient, model: str, tokens: int = 8) -> Any:
    body = {
        "model": model,
        "prompt": IDS,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
    }
    response = client.post("/v1/completions", json=body)
    return response.get_json()["choices"][0]["logprobs"] if response.status_code == 200 else None


@pytest.mark.usefixtures("native_ops")
def test_they_come_and_go_while_others_run(
    clients: tuple[FlaskClient, FlaskClient], root: Path
) -> None:
    """Answers are those of adapters that were there from the start, bit by bit."""
    api, management = clients
    expected = {"tiny": ask(api, "tiny", 60)}
    from_start = opened()
    for name in ("de", "fr", "short"):
        from_start.model.adapters.load(name, root / name)
    worker = LocalWorker(lambda: from_start, 8)
    worker.start()
    worker.wait_loaded()
    other = create_app(worker, ApiSettings(Limits(40, 60))).test_client()
    expected |= {name: ask(other, name) for name in ("de", "fr", "short")}
    worker.close()
    assert len({str(one["token_logprobs"][:8]) for one in expected.values()}) == 4

    found: list[Any] = []
    running = threading.Thread(target=lambda: found.append(ask(api, "tiny", 60)))
    running.start()
    for name in ("de", "fr", "short"):
        assert ask(api, name) is None
        body = {"lora_name": name, "lora_path": name}
        assert management.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert ask(api, name) == expected[name]
    running.join()
    assert found == [expected["tiny"]], "who ran meanwhile has noticed nothing"

    inplace = {"lora_name": "de", "lora_path": "fr", "load_inplace": True}
    assert management.post("/v1/load_lora_adapter", json=inplace).status_code == 200
    assert ask(api, "de") == expected["fr"], "nothing of the old one is found in the cache"
    for name in ("de", "short"):
        gone = management.post("/v1/unload_lora_adapter", json={"lora_name": name})
        assert gone.status_code == 200 and ask(api, name) is None
    names = [one["id"] for one in api.get("/v1/models").get_json()["data"]]
    assert names == ["tiny", "fr"]
    assert ask(api, "fr") == expected["fr"]


def test_an_adapter_that_goes_while_its_request_is_on_its_way_is_a_404(
    clients: tuple[FlaskClient, FlaskClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that had gone before: clients choose another model, and do not mend their request."""
    api, management = clients
    management.post("/v1/load_lora_adapter", json={"lora_name": "de", "lora_path": "de"})
    adds = Engine.add

    def late(engine: Engine, request: Request) -> Any:
        engine.runner.adapters.unload("de")  # type: ignore[attr-defined]
        return adds(engine, request)

    monkeypatch.setattr(Engine, "add", late)
    response = api.post("/v1/completions", json={"model": "de", "prompt": IDS})
    error = response.get_json()["error"]
    assert (response.status_code, error["code"]) == (404, "model_not_found")
    assert "no adapter 'de' is loaded" in error["message"]


def test_an_adapter_that_goes_while_its_request_is_checked_is_not_the_model(
    clients: tuple[FlaskClient, FlaskClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the model itself would answer what was for the adapter, without a word."""
    api, management = clients
    management.post("/v1/load_lora_adapter", json={"lora_name": "de", "lora_path": "de"})
    plans = routes.plan_completion

    def late(*args: Any) -> Any:
        management.post("/v1/unload_lora_adapter", json={"lora_name": "de"})
        return plans(*args)

    monkeypatch.setattr(routes, "plan_completion", late)
    response = api.post("/v1/completions", json={"model": "de", "prompt": IDS})
    assert (response.status_code, response.get_json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_that_is_damaged_is_a_clear_400(
    clients: tuple[FlaskClient, FlaskClient], root: Path
) -> None:
    api, management = clients
    damaged = root / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text("{}")
    body = {"lora_name": "x", "lora_path": "damaged"}
    response = management.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 400
    assert "damaged/adapter_config.json" in response.get_json()["error"]["message"]
    assert ask(api, "tiny") is not None
