"""The management application: probes, metrics, and adapters that come and go."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import LocalWorker, make_served
from flask.testing import FlaskClient

from common.errors import UserError
from llm.serving.api import create_app
from llm.serving.keys import Keys
from llm.serving.management import create_management_app
from llm.serving.metrics import Metrics
from llm.serving.requests import Limits
from llm.serving.web import ApiSettings


class Adapters:
    """What ``RequestAdapters`` does, with directories alone."""

    longest = 0

    def __init__(self) -> None:
        self.places: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.places)

    def load(self, name: str, directory: str, *, replace: bool) -> None:
        if name in self.places and not replace:
            raise UserError(f"an adapter {name!r} is loaded already; unload it first")
        if not (Path(directory) / "adapter_config.json").exists():
            raise UserError(f"{directory} has no adapter_config.json")
        self.places[name] = directory

    def unload(self, name: str) -> None:
        del self.places[name]


class Sides:
    """Both applications around one worker whose adapters are known."""

    def __init__(self, directory: Path | None) -> None:
        served = make_served()
        self.adapters = served.engine.adapters = Adapters()
        self.worker = LocalWorker(lambda: served)
        self.worker.start()
        self.worker.wait_loaded()
        settings = ApiSettings(Limits(100, 50), keys=Keys(single="the-one-key"), aliases=("llm",))
        metrics = Metrics(self.worker)
        self.api: FlaskClient = create_app(
            self.worker, settings, metrics, shows_metrics=False
        ).test_client()
        self.management: FlaskClient = create_management_app(
            self.worker, settings, metrics, directory
        ).test_client()

    def post(self, route: str, **body: Any) -> Any:
        return self.management.post(f"/v1/{route}_lora_adapter", json=body)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory of adapters, and one beside it."""
    for place in ("root/german", "root/french", "beside"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_config.json").touch()
    return tmp_path / "root"


@pytest.fixture
def sides(root: Path) -> Iterator[Sides]:
    both = Sides(root)
    yield both
    both.worker.close()


def test_probes_and_metrics_leave_the_apis_port(sides: Sides) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert sides.management.get(path).get_json() == {"status": "ok"}
    assert sides.management.get("/version").get_json()["model"] == "fake-llama"
    key = {"Authorization": "Bearer the-one-key"}
    sides.api.post("/v1/completions", json={"prompt": "hi"}, headers=key).close()
    text = sides.management.get("/metrics").get_data(as_text=True)
    assert 'vllm:prompt_tokens_total{engine="0",model_name="fake-llama"} 3.0' in text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0' in text
    assert sides.api.get("/health").status_code == 200
    for path in ("/metrics", "/v1/load_lora_adapter", "/health/live"):
        response = sides.api.post(path, json={}, headers=key)
        assert response.status_code == 404, "only on the management port"
    refused = sides.management.post("/v1/completions", json={"prompt": "hi"}, headers=key)
    assert refused.status_code == 404


def test_readiness_is_not_liveness(sides: Sides) -> None:
    worker, loaded = sides.worker, sides.worker._served
    for served, status in ((None, "loading"), (loaded, "ok")):
        worker._served = served
        ready = sides.management.get("/health/ready")
        assert ready.status_code == (200 if status == "ok" else 503)
        assert ready.get_json() == {"status": status}
        live = sides.management.get("/health/live")
        assert (live.status_code, live.get_json()) == (200, {"status": status})
    worker.close()
    assert sides.management.get("/health/ready").status_code == 503
    assert sides.management.get("/health/live").status_code == 200, "its answers still end"


def test_adapters_come_and_go(sides: Sides, root: Path) -> None:
    loaded = sides.post("load", lora_name="de", lora_path="german")
    assert loaded.status_code == 200 and "'de' added" in loaded.get_data(as_text=True)
    assert sides.post("load", lora_name="fr", lora_path=str(root / "french")).status_code == 200
    key = {"Authorization": "Bearer the-one-key"}
    asked = {"prompt": "hi", "model": "de"}
    assert sides.api.post("/v1/completions", json=asked, headers=key).get_json()["model"] == "de"
    again = sides.post("load", lora_name="de", lora_path="french")
    assert again.status_code == 400 and "loaded already" in again.get_json()["error"]["message"]
    inplace = sides.post("load", lora_name="de", lora_path="french", load_inplace=True)
    assert inplace.status_code == 200
    assert sides.adapters.places["de"] == str(root / "french")
    names = [one["id"] for one in sides.api.get("/v1/models", headers=key).get_json()["data"]]
    assert set(names) == {"fake-llama", "llm", "de", "fr"}
    gone = sides.post("unload", lora_name="de")
    assert gone.status_code == 200 and "'de' removed" in gone.get_data(as_text=True)
    assert sides.api.post("/v1/completions", json=asked, headers=key).status_code == 404
    absent = sides.post("unload", lora_name="de", lora_int_id=1)
    assert absent.status_code == 404 and "loaded: fr" in absent.get_json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../beside", 400),
        ("german/../../beside", 400),
        ("{beside}", 400),
        ("/", 400),
        (".", 400),
        ("", 400),
        ("link", 400),
        ("files", 400),
        ("loop", 400),
        ("german\0", 400),
        ("x" * 5000, 400),
        ("nowhere", 404),
        ("german/adapter_config.json", 404),
    ],
)
def test_nothing_outside_the_directory_is_read(
    sides: Sides, root: Path, path: str, status: int
) -> None:
    """Links are followed first, also those of single files."""
    beside = root.parent / "beside"
    (root / "link").symlink_to(beside)
    (root / "files").mkdir()
    (root / "files" / "adapter_config.json").symlink_to(beside / "adapter_config.json")
    (root / "loop").symlink_to(root / "loop")
    response = sides.post("load", lora_name="x", lora_path=path.replace("{beside}", str(beside)))
    assert response.status_code == status
    assert response.get_json()["error"]["param"] == "lora_path"
    assert not sides.adapters.places


def test_links_that_stay_below_are_followed(sides: Sides, root: Path) -> None:
    """As in a cache whose snapshots link to blobs."""
    (root / "snapshot").mkdir()
    (root / "snapshot" / "adapter_config.json").symlink_to(root / "german" / "adapter_config.json")
    (root / "newest").symlink_to(root / "snapshot")
    assert sides.post("load", lora_name="x", lora_path="newest").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"lora_name": "fake-llama", "lora_path": "german"}, 400, "a name of the model itself"),
        ({"lora_name": "llm", "lora_path": "german"}, 400, "a name of the model itself"),
        ({"lora_name": "default", "lora_path": "german"}, 400, "a name of the model itself"),
        ({"lora_path": "german"}, 400, "lora_name is missing"),
        ({"lora_name": "x", "lora_path": "german", "rank": 8}, 400, "unknown field 'rank'"),
    ],
)
def test_bodies_that_are_wrong(sides: Sides, body: Any, status: int, message: str) -> None:
    response = sides.post("load", **body)
    assert response.status_code == status
    assert message in response.get_json()["error"]["message"]


def test_without_a_directory_adapters_stay(root: Path) -> None:
    both = Sides(None)
    try:
        for route in ("load", "unload"):
            response = both.post(route, lora_name="x", lora_path=str(root / "german"))
            assert response.status_code == 403
            assert "--adapter_dir" in response.get_json()["error"]["message"]
    finally:
        both.worker.close()
