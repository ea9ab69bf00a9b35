"""What operators and their tools ask for, on a port of its own: health, metrics, adapters.

Nobody needs a key here: who reaches the port is trusted, which is why it has an address of its own
(``--management_host``). Bodies of the adapters' routes are vLLM's:
https://docs.vllm.ai/en/stable/features/lora/#dynamically-serving-lora-adapters
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from flask import Flask, Response

from llm.serving.api import OwnRoutes
from llm.serving.bodies import RequestBody, parse_body
from llm.serving.edge import surround
from llm.serving.errors import ApiError
from llm.serving.loop import EngineWorker
from llm.serving.metrics import Metrics
from llm.serving.web import Api, ApiSettings, json_body


class LoadBody(RequestBody):
    """``POST /v1/load_lora_adapter``."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(RequestBody):
    """``POST /v1/unload_lora_adapter``; an adapter's number, which vLLM takes too, says nothing."""

    lora_name: str
    lora_int_id: int | None = None


def create_management_app(
    worker: EngineWorker,
    settings: ApiSettings,
    metrics: Metrics,
    adapter_dir: str | Path | None = None,
) -> Flask:
    """Build the management application.

    Args:
        worker: that answers.
        settings: the operator's.
        metrics: in which the API counts.
        adapter_dir: below which adapters may be loaded while the server runs; none when not given.
    """
    app = Flask("llm.serving.management", static_folder=None)
    api = Api(worker, settings, metrics)
    surround(app, api, keyed=False)
    own = OwnRoutes(api)
    gets = {
        "/health": own.health,
        "/health/ready": own.health,
        "/health/live": own.live,
        "/version": own.version,
        "/metrics": own.metrics,
    }
    api.add(app, gets, method="GET")
    adapters = _Adapters(api, None if adapter_dir is None else Path(adapter_dir))
    posts = {
        "/v1/load_lora_adapter": adapters.load,
        "/v1/unload_lora_adapter": adapters.unload,
    }
    api.add(app, posts)
    return app


@dataclass(frozen=True)
class _Adapters:
    """Adapters that come and go while requests run."""

    api: Api
    directory: Path | None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self) -> Response:
        """``POST /v1/load_lora_adapter``."""
        root = self._root()
        body = parse_body(LoadBody, json_body())
        place = _below(root, body.lora_path)
        settings, served = self.api.settings, self.api.worker.served
        if body.lora_name in (served.model.name, *settings.aliases, *settings.any_names):
            raise ApiError(
                f"lora_name={body.lora_name!r} is a name of the model itself; give the adapter "
                "another",
                param="lora_name",
                code="invalid_value",
            )
        with self.lock:
            self._change(body.lora_name, str(place), replace=body.load_inplace)
        return _said(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    def unload(self) -> Response:
        """``POST /v1/unload_lora_adapter``; requests that run with it go on to their end."""
        self._root()
        body = parse_body(UnloadBody, json_body())
        names = self.api.worker.served.model.adapter_names
        if body.lora_name not in names:
            raise ApiError(
                f"no adapter {body.lora_name!r} is loaded; loaded: {', '.join(names) or 'none'}",
                status=404,
                param="lora_name",
                code="adapter_not_found",
            )
        with self.lock:
            self._change(body.lora_name, None)
        return _said(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _root(self) -> Path:
        if self.directory is None:
            raise ApiError(
                "adapters come and go while the server runs only where it was started with "
                "--adapter_dir DIR, below which they lie",
                status=403,
                code="adapters_fixed",
            )
        return self.directory.resolve()

    def _change(self, name: str, directory: str | None, *, replace: bool = False) -> None:
        self.api.worker.change_adapters(name, directory, replace=replace)


def _below(root: Path, given: str) -> Path:
    """Return an adapter's directory, links followed, of which nothing lies elsewhere.

    Raises:
        ApiError: 400, it or a file in it is not below the root; 404, it is not there.
    """
    try:
        place = (root / given).resolve()
        found = place.is_dir()
        files = list(place.iterdir()) if found else []
        inside = all(_inside(root, one.resolve()) for one in (place, *files))
    except (OSError, ValueError, RuntimeError):  # a link to itself, a name of a kind that none has
        found, inside = False, False
    if not inside:
        raise ApiError(
            f"lora_path={given!r} leads out of the directory of adapters (--adapter_dir); name a "
            "directory below it, whose files lie below it too",
            param="lora_path",
            code="invalid_value",
        )
    if not found:
        raise ApiError(
            f"lora_path={given!r} is no directory below --adapter_dir",
            status=404,
            param="lora_path",
            code="adapter_not_found",
        )
    return place


def _inside(root: Path, place: Path) -> bool:
    return place != root and place.is_relative_to(root)


def _said(text: str) -> Response:
    return Response(text, content_type="text/plain; charset=utf-8")
