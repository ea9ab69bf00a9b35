"""What the routes of all families share: the worker behind them, JSON in and out, streams.

A family is a module with ``add_routes(app, api)``: it names its routes to :meth:`Api.add`, reads
bodies with :func:`json_body`, makes a :class:`llm.serving.requests.Plan` of them and answers with
:meth:`Api.respond` in its own format.
"""

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from flask import Flask, Response, g, request

from llm.config.serving import ANY_MODEL
from llm.serving.access_log import AccessLog
from llm.serving.bridge import GONE
from llm.serving.errors import ApiError, ClientGoneError
from llm.serving.keys import Keys
from llm.serving.loop import EngineWorker, Gone, Served
from llm.serving.metrics import Metrics
from llm.serving.requests import Event, Limits, Plan, run
from llm.serving.watch import Watch

ErrorBody = Callable[[ApiError], dict[str, Any]]


@dataclass(frozen=True)
class Wire:
    """How the chunks of a stream are sent.

    Args:
        encode: a chunk as text.
        end: what follows the last one.
        content_type: of the response.
    """

    encode: Callable[[dict[str, Any]], str]
    end: str = ""
    content_type: str = "text/event-stream; charset=utf-8"


def as_json(content: Any) -> str:
    """Return compact JSON that keeps characters as they are."""
    return json.dumps(content, ensure_ascii=False)


EVENTS = Wire(lambda chunk: f"data: {as_json(chunk)}\n\n")
OPENAI_EVENTS = Wire(EVENTS.encode, end="data: [DONE]\n\n")
# Each event under its chunk's own type, as OpenAI's Responses API and Anthropic's do.
TYPED_EVENTS = Wire(lambda chunk: f"event: {chunk['type']}\n{EVENTS.encode(chunk)}")


@dataclass(frozen=True)
class ApiSettings:
    """What an operator sets.

    Args:
        limits: token limits of one request.
        max_body_bytes: largest request body.
        keys: that requests have to carry, where there are any.
        aliases: further names by which requests may ask for the model.
        any_names: such names that clients send where nobody has set one.
        cors_origins: whose pages may use the API from a browser; ``*`` is all.
        access_log: gets a line for each request.
    """

    limits: Limits
    max_body_bytes: int = 1 << 20
    keys: Keys = field(default_factory=Keys)
    aliases: tuple[str, ...] = ()
    any_names: tuple[str, ...] = ANY_MODEL
    cors_origins: tuple[str, ...] = ()
    access_log: AccessLog | None = None


class StreamFormat(Protocol):
    """A stream under construction, in a family's own shape."""

    def chunks(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream."""


class Format(StreamFormat, Protocol):
    """A response under construction that may also be sent whole."""

    def whole(self, events: Iterable[Event]) -> Any:
        """Return the response that is not streamed."""


@dataclass(frozen=True)
class Api:
    """What the view functions share.

    Args:
        worker: answers; it may still be loading.
        settings: the operator's.
        metrics: counters.
        created: when the server started, seconds since 1970.
        error_bodies: shapes of the errors on paths whose clients do not parse OpenAI's.
    """

    worker: EngineWorker
    settings: ApiSettings
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    error_bodies: dict[str, ErrorBody] = field(default_factory=dict)

    def add(
        self,
        app: Flask,
        views: Mapping[str, Callable[..., Response]],
        *,
        method: str = "POST",
        error_body: ErrorBody = ApiError.openai_body,
    ) -> None:
        """Add routes to an application.

        Args:
            app: of the routes.
            views: what answers each path.
            method: of the requests.
            error_body: shape of their errors.
        """
        for path, view in views.items():
            app.add_url_rule(path, path, view, methods=[method])
            self.error_bodies[path] = error_body

    def error_body(self, error: ApiError) -> dict[str, Any]:
        """Return an error in the shape of the present request's path."""
        return self.error_bodies.get(request.path, ApiError.openai_body)(error)

    def check_model(self, model_id: str | None) -> Served:
        """Return what is served; refuse a model that is not.

        Adapters may go at any time: whoever asks again for what is served might find the one gone
        that has been named, and take the request for one to the model itself.

        Raises:
            ApiError: 404; 503 while loading or stopping.
        """
        settings, served = self.settings, self.worker.served
        names = *served.names, *settings.aliases
        if model_id is not None and model_id not in (*names, *settings.any_names):
            raise ApiError(
                f"the model {model_id!r} is not served here; this server has "
                f"{', '.join(map(repr, names))}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return served

    def respond(self, plan: Plan, shape: Format, *, stream: bool, wire: Wire = EVENTS) -> Response:
        """Answer a request.

        Args:
            plan: what is generated.
            shape: of the response.
            stream: send the answer as it grows.
            wire: how a stream is sent.

        Raises:
            ApiError: see :func:`llm.serving.requests.run`, up to the first event; 429, the key's
                minute is full.
        """
        if stream:
            return self.stream(plan, shape, wire)
        return json_response(shape.whole(self._events(plan)))

    def _events(self, plan: Plan) -> Generator[Event, None, None]:
        """Take what an answer may come to off its key's limit, and begin it.

        Raises:
            ApiError: 429, the key's minute is full.
        """
        watch: Watch = g.watch
        watch.model = plan.adapter or self.worker.served.model.name
        if g.key is not None:
            watch.charge = g.key.rates.take_tokens(plan.most_tokens)
        return _heard(plan, self.worker, watch)

    def stream(self, plan: Plan, shape: StreamFormat, wire: Wire) -> Response:
        """Answer a request with a stream; see :meth:`respond`."""
        events = self._events(plan)
        # The first event is awaited here, so that a full queue or a failing engine still gets a
        # status of its own instead of an error inside a stream that began with 200.
        first = next(events)
        error_body = self.error_bodies.get(request.path, ApiError.openai_body)
        body = _encoded(shape.chunks(chain([first], events)), error_body, wire)
        response = Response(body, content_type=wire.content_type)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # nginx would collect the chunks otherwise
        response.call_on_close(events.close)
        return response


def json_response(content: Any, status: int = 200) -> Response:
    """Return a response of JSON."""
    return Response(as_json(content), status=status, content_type="application/json; charset=utf-8")


def json_body() -> bytes:
    """Return the present request's body.

    Raises:
        ApiError: 415 when it does not say that it is JSON, or that it is packed.
    """
    # Besides being right, this makes browsers ask first (CORS preflight), so that foreign pages
    # cannot use a server on localhost.
    if request.mimetype != "application/json":
        raise ApiError(
            f"Content-Type is {request.mimetype or 'missing'!r}; send application/json",
            status=415,
            code="unsupported_media_type",
        )
    packed = request.headers.get("Content-Encoding", "identity")
    if packed.lower() not in ("identity", ""):
        raise ApiError(
            f"Content-Encoding is {packed!r:.60}; send the body as it is, without one",
            status=415,
            code="unsupported_media_type",
        )
    body = request.get_data(cache=False)
    if g.watch.with_texts:
        g.watch.body = body
    return body


def _heard(plan: Plan, worker: EngineWorker, watch: Watch) -> Generator[Event, None, None]:
    """Yield the events of an answer; its watch notes what is told."""
    with closing(run(plan, worker, _client_gone(), watch)) as events:
        try:
            for event in events:
                watch.text(event.index, event.pieces)
                yield event
        except ApiError as error:
            watch.error = error.code
            raise


def _encoded(chunks: Iterable[dict[str, Any]], error_body: ErrorBody, wire: Wire) -> Iterator[str]:
    """Encode the chunks of a stream; an error becomes the last one."""
    try:
        for chunk in chunks:
            yield wire.encode(chunk)
    except ClientGoneError:
        return
    except ApiError as error:
        yield wire.encode(error_body(error))
    yield wire.end


def _client_gone() -> Gone:
    """Return the test whether the client has closed its connection."""
    return request.environ.get(GONE) or (lambda: False)
