"""The HTTP API: the routes of each family, ``/health``, ``/version``, ``/metrics``.

:func:`create_app` returns a Flask application; :mod:`llm.serving.wsgi` serves it. Every error is
JSON in the format that the route's clients parse, every response carries ``X-Request-Id``.
"""

from dataclasses import dataclass

from flask import Flask, Response

from common import __version__
from llm.serving.anthropic import routes as anthropic_routes
from llm.serving.edge import surround
from llm.serving.loop import EngineWorker
from llm.serving.metrics import Metrics
from llm.serving.mindie import routes as mindie_routes
from llm.serving.openai import routes as openai_routes
from llm.serving.paddlenlp import routes as paddlenlp_routes
from llm.serving.responses import routes as responses_routes
from llm.serving.tgi import routes as tgi_routes
from llm.serving.tokenizing import routes as tokenizing_routes
from llm.serving.web import Api, ApiSettings, json_response

_FAMILIES = (
    openai_routes.add_routes,
    responses_routes.add_routes,
    anthropic_routes.add_routes,
    tgi_routes.add_routes,
    mindie_routes.add_routes,
    paddlenlp_routes.add_routes,
    tokenizing_routes.add_routes,
)


def create_app(
    worker: EngineWorker,
    settings: ApiSettings,
    metrics: Metrics | None = None,
    *,
    shows_metrics: bool = True,
) -> Flask:
    """Build the API around a worker, which may still be loading.

    Args:
        worker: answers.
        settings: the operator's.
        metrics: to count in.
        shows_metrics: ``/metrics`` is a route of this application.
    """
    app = Flask("llm.serving", static_folder=None)
    api = Api(worker, settings, Metrics(worker) if metrics is None else metrics)
    surround(app, api)
    for add_routes in _FAMILIES:
        add_routes(app, api)
    own = OwnRoutes(api)
    gets = {"/health": own.health, "/version": own.version}
    if shows_metrics:
        gets["/metrics"] = own.metrics
    api.add(app, gets, method="GET")
    return app


@dataclass(frozen=True)
class OwnRoutes:
    """Routes about the server itself."""

    api: Api

    def health(self) -> Response:
        """``GET /health``: 200 when requests are answered, else 503."""
        status = self.api.worker.status
        return json_response({"status": status}, 200 if status == "ok" else 503)

    def live(self) -> Response:
        """``GET /health/live``: 200 as long as there is somebody to say so."""
        return json_response({"status": self.api.worker.status})

    def version(self) -> Response:
        """``GET /version``: what runs, and which form each op takes and why."""
        facts = self.api.worker.served.model.facts
        return json_response(
            {
                "version": __version__,
                "paddle": facts.paddle,
                "model": facts.name,
                "ops": facts.ops,
            }
        )

    def metrics(self) -> Response:
        """``GET /metrics``."""
        if (
            loaded := self.api.worker.loaded
        ) is not None:  # its series are there from then on, at 0
            self.api.metrics.of(loaded.model.name)
        text, content_type = self.api.metrics.render()
        return Response(text, content_type=content_type)
