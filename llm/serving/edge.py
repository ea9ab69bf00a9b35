"""What surrounds every request: its name, its key, errors as JSON, origins, logs, and its count."""

import logging
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from flask import Flask, Response, current_app, g, request
from flask_cors import CORS
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from llm.serving.absent import why_absent
from llm.serving.errors import ApiError, ClientGoneError
from llm.serving.keys import Key
from llm.serving.watch import Watch
from llm.serving.web import Api, json_response

logger = logging.getLogger(__name__)

# Probes and scrapers carry no key, and no log wants to hear of each.
PROBES = ("/health", "/health/live", "/health/ready", "/metrics")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLIENT_CLOSED = 499  # nginx's status for it; only the log and the metrics see it
_PREFLIGHT_SECONDS = 600
_UNASKED = {"HEAD", "OPTIONS"}  # methods that browsers and probes send of themselves
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def surround(app: Flask, api: Api, *, keyed: bool = True) -> None:
    """Put an application's routes behind what all requests pass.

    Args:
        app: with or without its routes.
        api: what the routes share.
        keyed: requests carry a key and may come from pages of other origins, as the settings say.
    """
    app.config["MAX_CONTENT_LENGTH"] = api.settings.max_body_bytes
    app.json.sort_keys = False
    edge = _Edge(api, keyed)
    app.before_request(edge.begin)
    app.after_request(edge.end)
    app.register_error_handler(Exception, edge.failed)
    if keyed and (origins := list(api.settings.cors_origins)):
        CORS(
            app,
            origins=origins,
            send_wildcard=origins == ["*"],
            expose_headers=["X-Request-Id", "Retry-After", *_rate_headers()],
            max_age=_PREFLIGHT_SECONDS,
        )


def _rate_headers() -> Iterator[str]:
    for what in ("requests", "tokens"):
        for name in ("limit", "remaining", "reset"):
            yield f"x-ratelimit-{name}-{what}"


@dataclass(frozen=True)
class _Edge:
    api: Api
    keyed: bool

    def begin(self) -> None:
        """Name the request, check its key, and count it against the key's limit."""
        given = request.headers.get("X-Request-Id", "")
        log = self.api.settings.access_log
        g.key = None
        g.watch = watch = Watch(
            self.api.metrics,
            given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
            with_texts=log is not None and log.texts,
        )
        if not self.keyed or request.path in PROBES or self._is_preflight():
            return
        if self.api.settings.keys.wanted:
            key = g.key = self._key()
            watch.key = key.name
            if key.name is not None:
                self.api.metrics.key_requests.labels(key.name).inc()
            if request.method == "POST":
                key.rates.take_request()

    def _is_preflight(self) -> bool:
        """Whether a browser asks if a page may send a request; it has no key yet."""
        asks = "Access-Control-Request-Method" in request.headers
        return bool(self.api.settings.cors_origins) and request.method == "OPTIONS" and asks

    def _key(self) -> Key:
        """Return whose key the request carries, in OpenAI's header or in Anthropic's."""
        kind, _, bearer = request.headers.get("Authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key")
        found = self.api.settings.keys.find(given) if given else None
        if found is None:
            raise ApiError(
                f"this server needs a key, and {'this is none of its' if given else 'none came'}: "
                "send the header 'Authorization: Bearer KEY' (or 'x-api-key: KEY') with a key that "
                "it was started with (--api_key, --api_keys)",
                status=401,
                code="invalid_api_key",
            )
        return found

    def end(self, response: Response) -> Response:
        """Add the headers of every response; log and count when its last byte is out."""
        watch: Watch = g.watch
        response.headers["X-Request-Id"] = watch.request_id
        if g.key is not None:
            response.headers.update(g.key.rates.headers())
        rule = request.url_rule
        handler = "none" if rule is None else rule.rule
        # Of methods and paths that clients make up there may be any number, with any characters.
        method = request.method if request.method in _METHODS else "other"
        path, status = request.path.encode("unicode_escape").decode(), response.status_code
        client, probe = request.remote_addr, request.path in PROBES
        metrics, access_log = self.api.metrics, self.api.settings.access_log

        def close() -> None:
            seconds = watch.close()
            metrics.http_requests.labels(handler, method, f"{status // 100}xx").inc()
            metrics.http_seconds.labels(handler, method).observe(seconds)
            level = logging.DEBUG if probe else logging.INFO
            logger.log(level, "%s %s %s %d %.3fs", watch.request_id, method, path, status, seconds)
            if access_log is not None and not probe:
                asked = {"client": client, "method": method, "path": path, "status": status}
                access_log.write(watch.entry() | asked | {"seconds": round(seconds, 6)})

        response.call_on_close(close)
        return response

    def failed(self, error: Exception) -> Response:
        """Turn any exception into a JSON error."""
        if isinstance(error, ClientGoneError):
            return Response(status=_CLIENT_CLOSED)
        api_error = self._as_api_error(error)
        g.watch.error = api_error.code
        if api_error.status == 429 and g.watch.key is not None:
            self.api.metrics.key_refused.labels(g.watch.key, api_error.kind).inc()
        response = json_response(self.api.error_body(api_error), api_error.status)
        if isinstance(error, HTTPException) and error.code == 405:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
        if api_error.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if api_error.retry_after is not None:
            response.headers["Retry-After"] = str(api_error.retry_after)
        response.headers.update(api_error.headers)
        return response

    def _as_api_error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestEntityTooLarge):
            return ApiError(
                f"the request body of {request.content_length} bytes is larger than the limit of "
                f"{self.api.settings.max_body_bytes} bytes (--max_body_bytes); send less",
                status=413,
                code="body_too_large",
            )
        if isinstance(error, HTTPException):
            return ApiError(_explain(error), status=error.code or 500, code="http_error")
        request_id = g.watch.request_id
        logger.error("request %s failed", request_id, exc_info=error)
        return ApiError(
            f"internal error; the server's log has the details under {request_id}",
            status=500,
            code="internal_error",
        )


def _explain(error: HTTPException) -> str:
    path = request.path
    if error.code == 404:
        paths = [rule.rule for rule in current_app.url_map.iter_rules() if not rule.arguments]
        if (near := path.rstrip("/")) != path and near in paths:
            return f"there is no {path}; send it to {near}"
        if why := why_absent(path):
            return f"there is no {path}: {why}"
        return f"there is no {path}; this server has {', '.join(paths[:-1])} and {paths[-1]}"
    if error.code == 405:
        methods = sorted(set(error.valid_methods or ()) - _UNASKED)
        return f"{path} does not take {request.method}; use {' or '.join(methods)}"
    return error.description or error.name
