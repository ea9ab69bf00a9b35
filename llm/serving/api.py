"""The HTTP API: OpenAI's chat and completions routes, ``/generate``, ``/health``, ``/metrics``.

:func:`create_app` returns a Flask application; :mod:`llm.serving.wsgi` serves it. Every error is
JSON in the format that the route's clients parse, every response carries ``X-Request-Id``.
"""

import dataclasses
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from common import __version__
from llm.serving.errors import ApiError, ClientGoneError
from llm.serving.loop import EngineWorker, Gone
from llm.serving.metrics import Metrics
from llm.serving.openai_format import ChatFormat, CompletionFormat
from llm.serving.requests import Limits, Plan, plan_chat, plan_completion, plan_generate, run
from llm.serving.schema import ChatRequest, CompletionRequest, GenerateRequest, parse_body
from llm.serving.tgi_format import GenerateFormat

logger = logging.getLogger(__name__)

_OPEN_PATHS = ("/health", "/metrics")  # probes and scrapers carry no key
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLIENT_CLOSED = 499  # nginx's status for it; only the log and the metrics see it


@dataclass(frozen=True)
class ApiSettings:
    """What an operator sets.

    Args:
        limits: token limits of one request.
        max_body_bytes: largest request body.
        api_key: when set, requests need ``Authorization: Bearer KEY``.
    """

    limits: Limits
    max_body_bytes: int = 1 << 20
    api_key: str | None = None


def create_app(worker: EngineWorker, settings: ApiSettings) -> Flask:
    """Build the WSGI application around a worker (which may still be loading)."""
    app = Flask("llm.serving", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.json.sort_keys = False
    routes = _Routes(worker, settings, Metrics(), int(time.time()))
    app.before_request(routes.begin)
    app.after_request(routes.end)
    app.register_error_handler(Exception, routes.failed)
    app.add_url_rule("/v1/chat/completions", view_func=routes.chat, methods=["POST"])
    app.add_url_rule("/v1/completions", view_func=routes.completions, methods=["POST"])
    app.add_url_rule("/generate", view_func=routes.generate, methods=["POST"])
    app.add_url_rule("/v1/models", view_func=routes.models)
    app.add_url_rule("/v1/models/<path:model_id>", view_func=routes.model)
    app.add_url_rule("/health", view_func=routes.health)
    app.add_url_rule("/version", view_func=routes.version)
    app.add_url_rule("/metrics", view_func=routes.metrics_text)
    return app


@dataclass(frozen=True)
class _Routes:
    """The view functions and what they share."""

    worker: EngineWorker
    settings: ApiSettings
    metrics: Metrics
    created: int

    def begin(self) -> None:
        """Name the request and check its key."""
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        g.begin = time.monotonic()
        key = self.settings.api_key
        if key is None or request.path in _OPEN_PATHS:
            return
        given = request.headers.get("Authorization", "")
        # Bytes: compare_digest refuses non-ASCII strings.
        if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise ApiError(
                "this server needs a key: send the header 'Authorization: Bearer KEY' with the "
                "key it was started with (--api_key)",
                status=401,
                code="invalid_api_key",
            )

    def end(self, response: Response) -> Response:
        """Add the request id; log and count when the last byte is out."""
        response.headers["X-Request-Id"] = g.request_id
        path, request_id, begin = request.path, g.request_id, g.begin
        method, status = request.method, response.status_code
        self.metrics.responses.inc(value=str(status))
        level = logging.DEBUG if path in _OPEN_PATHS else logging.INFO

        def log() -> None:
            seconds = time.monotonic() - begin
            logger.log(level, "%s %s %s %d %.3fs", request_id, method, path, status, seconds)

        response.call_on_close(log)
        return response

    def failed(self, error: Exception) -> Response:
        """Turn any exception into a JSON error."""
        if isinstance(error, ClientGoneError):
            return Response(status=_CLIENT_CLOSED)
        api_error = self._as_api_error(error)
        response = _json(_error_body(api_error), api_error.status)
        if isinstance(error, HTTPException) and error.code == 405:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
        if api_error.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if api_error.retry_after is not None:
            response.headers["Retry-After"] = str(api_error.retry_after)
        return response

    def _as_api_error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestEntityTooLarge):
            return ApiError(
                f"the request body of {request.content_length} bytes is larger than the limit of "
                f"{self.settings.max_body_bytes} bytes (--max_body_bytes); send less",
                status=413,
                code="body_too_large",
            )
        if isinstance(error, HTTPException):
            return ApiError(_explain(error), status=error.code or 500, code="http_error")
        logger.error("request %s failed", g.request_id, exc_info=error)
        return ApiError(
            f"internal error; the server's log has the details under {g.request_id}",
            status=500,
            code="internal_error",
        )

    def chat(self) -> Response:
        """``POST /v1/chat/completions``."""
        body = parse_body(ChatRequest, _json_body())
        self._check_model(body.model)
        plan = plan_chat(body, self.worker.served, self.settings.limits)
        shape = ChatFormat(
            plan.adapter or self.worker.served.model.name,
            plan,
            include_usage=_wants_usage(body),
            logprobs=bool(body.logprobs),
        )
        return self._respond(plan, shape, stream=bool(body.stream), done=True)

    def completions(self) -> Response:
        """``POST /v1/completions``."""
        body = parse_body(CompletionRequest, _json_body())
        self._check_model(body.model)
        plan = plan_completion(body, self.worker.served, self.settings.limits)
        shape = CompletionFormat(
            plan.adapter or self.worker.served.model.name,
            plan,
            include_usage=_wants_usage(body),
            logprobs=body.logprobs is not None,
            echo=bool(body.echo),
        )
        return self._respond(plan, shape, stream=bool(body.stream), done=True)

    def generate(self) -> Response:
        """``POST /generate``."""
        body = parse_body(GenerateRequest, _json_body())
        plan = plan_generate(body, self.worker.served, self.settings.limits)
        parameters = body.parameters
        shape = GenerateFormat(
            plan,
            details=bool(parameters and parameters.details),
            return_full_text=bool(parameters and parameters.return_full_text),
        )
        return self._respond(plan, shape, stream=bool(body.stream), done=False)

    def models(self) -> Response:
        """``GET /v1/models``."""
        return _json({"object": "list", "data": list(map(self._model, self.worker.served.names))})

    def model(self, model_id: str) -> Response:
        """``GET /v1/models/ID``."""
        self._check_model(model_id)
        return _json(self._model(model_id))

    def health(self) -> Response:
        """``GET /health``: 200 when requests are answered, else 503."""
        status = self.worker.status
        return _json({"status": status}, 200 if status == "ok" else 503)

    def version(self) -> Response:
        """``GET /version``: what runs, and which form each op takes and why."""
        model = self.worker.served.model
        import paddle  # loaded with the model

        return _json(
            {
                "version": __version__,
                "paddle": paddle.__version__,
                "model": model.name,
                "ops": [dataclasses.asdict(choice) for choice in model.ops],
            }
        )

    def metrics_text(self) -> Response:
        """``GET /metrics``."""
        text = self.metrics.render(self.worker)
        return Response(text, content_type="text/plain; version=0.0.4; charset=utf-8")

    def _model(self, name: str) -> dict[str, Any]:
        (model, engine), limits = self.worker.served, self.settings.limits
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "local",
            "max_model_len": engine.max_model_len,
            "max_prompt_tokens": min(limits.src_length, engine.max_model_len - 1),
            "max_new_tokens": limits.max_length,
            "has_chat_template": model.tokenizer.chat_template is not None,
            # As vLLM says of an adapter what it stands on.
            **({} if name == model.name else {"parent": model.name}),
        }

    def _check_model(self, model_id: str | None) -> None:
        names = self.worker.served.names
        if model_id is not None and model_id not in names:
            raise ApiError(
                f"the model {model_id!r} is not served here; this server has "
                f"{', '.join(map(repr, names))}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _respond(
        self,
        plan: Plan,
        shape: ChatFormat | CompletionFormat | GenerateFormat,
        *,
        stream: bool,
        done: bool,
    ) -> Response:
        events = run(plan, self.worker, _client_gone(), self.metrics)
        if not stream:
            return _json(shape.whole(events))
        # The first event is awaited here, so that a full queue or a failing engine still gets a
        # status of its own instead of an error inside a stream that began with 200.
        first = next(events)
        error_body = ApiError.openai_body if done else ApiError.tgi_body
        body = _server_sent(shape.chunks(chain([first], events)), error_body, done)
        response = Response(body, content_type="text/event-stream; charset=utf-8")
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # nginx would collect the chunks otherwise
        response.call_on_close(events.close)
        return response


def _server_sent(
    chunks: Iterable[dict[str, Any]], error_body: Callable[[ApiError], dict[str, Any]], done: bool
) -> Iterator[str]:
    """Encode chunks as server-sent events; an error becomes the last event."""
    try:
        for chunk in chunks:
            yield _event(chunk)
    except ClientGoneError:
        return
    except ApiError as error:
        yield _event(error_body(error))
    if done:
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error_body(error: ApiError) -> dict[str, Any]:
    return error.tgi_body() if request.path == "/generate" else error.openai_body()


def _json(content: dict[str, Any], status: int = 200) -> Response:
    text = json.dumps(content, ensure_ascii=False)
    return Response(text, status=status, content_type="application/json; charset=utf-8")


def _json_body() -> bytes:
    # Besides being right, this makes browsers ask first (CORS preflight), so that foreign pages
    # cannot use a server on localhost.
    if request.mimetype != "application/json":
        raise ApiError(
            f"Content-Type is {request.mimetype or 'missing'!r}; send application/json",
            status=415,
            code="unsupported_media_type",
        )
    return request.get_data(cache=False)


def _wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _client_gone() -> Gone:
    """Return waitress' test whether the client has closed its connection."""
    return request.environ.get("waitress.client_disconnected") or (lambda: False)


def _explain(error: HTTPException) -> str:
    if error.code == 404:
        return (
            f"there is no {request.path}; this server has /v1/chat/completions, /v1/completions, "
            "/v1/models, /generate, /health, /version and /metrics"
        )
    if error.code == 405:
        methods = " or ".join(sorted(error.valid_methods or ()))
        return f"{request.path} does not take {request.method}; use {methods}"
    return error.description or error.name
