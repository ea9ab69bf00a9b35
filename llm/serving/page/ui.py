"""The chat page: a Gradio server with a front end of its own, in front of the API over HTTP only.

    python -m llm.serving.page.ui --api_url http://127.0.0.1:8011 --port 8010

Conversations live in the browser; this process turns Markdown into safe HTML and passes questions
on, with the key that the user gave. The page needs nothing from the internet, and its content
security policy forbids a browser to load, run or send anything else than what lies in ``web/``.
"""

from common.ending import run_script  # isort: split

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import asyncio
import contextlib
import html
import inspect
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from common.errors import UserError
from common.flags import load
from llm import runtime
from llm.config.serving import ChatPageArguments
from llm.serving.listening import listen, local_url
from llm.serving.page.answers import Asked, answer
from llm.serving.page.client import ApiClient, Headers
from llm.serving.page.rendering import code_styles, render
from llm.serving.page.runs import Run, Runs
from llm.serving.tls import Tls


@contextlib.contextmanager
def _without_type_stubs() -> Iterator[None]:
    """Keep gradio from writing .pyi files beside its sources, which is half of its import's time.

    It writes none for a class that is in no file (gradio/component_meta.py).
    """
    real = inspect.getfile

    def getfile(what: Any) -> str:
        if isinstance(what, type) and what.__module__.startswith("gradio."):
            raise OSError("a page needs no type stubs")
        return real(what)

    with mock.patch.object(inspect, "getfile", getfile):
        yield


with runtime.fast_imports(), _without_type_stubs():
    import gradio as gr

_WEB = Path(__file__).parent / "web"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # after an upgrade no browser mixes old files with new ones
}
_NAME = re.compile("[0-9a-f]{24,64}")  # of an answer; nobody is to guess one
_MAX_BYTES = 32 << 20  # of a request to this process; the API has a limit of its own


class _Door:
    """Adds the headers to every response and takes the sub-path off every request (plain ASGI, so
    streams pass through)."""

    def __init__(self, app: Any, root_path: str) -> None:
        self._app, self._root = app, root_path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        # Proxies take it off themselves, or pass it on: both work.
        path = scope.get("path", "")
        if self._root and f"{path}/".startswith(f"{self._root}/"):
            path = path.removeprefix(self._root) or "/"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send_with_headers)


class ChatPage:
    """The page's routes.

    Args:
        client: talks to the API.
        title: heading of the page.
        root_path: path under which a proxy shows the page, such as ``/chat``.
    """

    def __init__(self, client: ApiClient, title: str, root_path: str = "") -> None:
        self._client, self._runs = client, Runs()
        text = (_WEB / "index.html").read_text(encoding="utf-8")
        # All modules at once: otherwise a browser learns of each from the one that imports it.
        modules = sorted(set(_WEB.glob("*.js")) - {_WEB / "theme.js"})  # which is a plain script
        link = '<link rel="modulepreload" href="{{{{ROOT}}}}/web/{}">'
        words = {
            "MODULES": "\n".join(link.format(module.name) for module in modules),
            "TITLE": html.escape(title),
            "ROOT": html.escape(root_path),
        }
        for name, word in words.items():
            text = text.replace(f"{{{{{name}}}}}", word)
        self._index, self._styles = text, code_styles()
        self.app = gr.Server(
            title=title,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            middleware=[Middleware(_Door, root_path)],
        )
        self.app.add_route("/", self.index)
        self.app.add_route("/code.css", self.code_css)
        self.app.add_route("/status", self.status)
        self.app.add_route("/render", self.render, methods=["POST"])
        self.app.add_route("/answer", self.answer, methods=["POST"])
        self.app.add_route("/follow", self.follow, methods=["POST"])
        self.app.add_route("/stop", self.stop, methods=["POST"])
        self.app.mount("/web", StaticFiles(directory=_WEB))

    async def index(self, request: Request) -> Response:
        """``GET /``."""
        return HTMLResponse(self._index)

    async def code_css(self, request: Request) -> Response:
        """``GET /code.css``: colours of code."""
        return Response(self._styles, media_type="text/css")

    async def status(self, request: Request) -> Response:
        """``GET /status``: what the API says of itself."""
        return JSONResponse(await self._client.status(_key(request)))

    async def render(self, request: Request) -> Response:
        """``POST /render`` ``{"texts": […]}``: the blocks of each text as HTML."""
        try:
            body = await _body(request)
        except UserError as error:
            return _refused(str(error))
        if not isinstance(body.get("texts"), list):
            return _refused("an object with the list 'texts' is wanted")
        texts = [str(text) for text in body["texts"]]
        blocks = [await asyncio.to_thread(render, text) for text in texts]
        # Escaped: a text may hold half of a pair of surrogates.
        return Response(json.dumps({"html": blocks}), media_type="application/json")

    async def answer(self, request: Request) -> Response:
        """``POST /answer``: an event a line, as :mod:`llm.serving.page.answers` lists them. The
        answer goes on without its reader for a while, who may `follow` it by its `id`."""
        try:
            body = await _body(request)
            name = _name(body)
            asked = Asked(**body)
        except (UserError, TypeError) as error:
            return _refused(str(error))
        if asked.route not in ("chat", "completions") or not isinstance(asked.body, dict):
            return _refused("'route' is chat or completions, and 'body' an object")
        if self._runs.find(name, _owner(request)):
            return _refused(f"the answer {name} has been asked for before; follow it")
        events = answer(self._client, asked, _key(request))
        return _streamed(self._runs.begin(name, _owner(request), events))

    async def follow(self, request: Request) -> Response:
        """``POST /follow`` ``{"id": …}``: the events of an answer from its beginning."""
        run = await self._named(request)
        return run if isinstance(run, Response) else _streamed(run)

    async def stop(self, request: Request) -> Response:
        """``POST /stop`` ``{"id": …}``: ends an answer, for all who follow it."""
        run = await self._named(request)
        if isinstance(run, Response):
            return run
        run.stop()
        return JSONResponse({})

    def close(self) -> None:
        """Interrupt the answers under way."""
        self._runs.close()

    async def _named(self, request: Request) -> Run | Response:
        """Return the answer that a request names, or a refusal."""
        try:
            name = _name(await _body(request))
        except UserError as error:
            return _refused(str(error))
        run = self._runs.find(name, _owner(request))
        unknown = f"no answer {name} is under way, nor has one ended lately"
        return run or _refused(unknown, "unknown_answer", 404)


def _streamed(run: Run) -> Response:
    async def lines() -> AsyncIterator[str]:
        async with contextlib.aclosing(run.follow()) as events:
            async for event in events:
                yield json.dumps(event) + "\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def _name(body: dict[str, Any]) -> str:
    """Take the id of an answer out of a request's body.

    Raises:
        UserError: it is none.
    """
    name = body.pop("id", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"'id' is {json.dumps(name)}; 24 to 64 hexadecimal digits are wanted")
    return name


def _owner(request: Request) -> str:
    return request.headers.get("Authorization", "")


def _key(request: Request) -> Headers:
    """Return the header that carries the user's key to the API."""
    given = request.headers.get("Authorization")
    # Any byte may stand in a key; starlette has read them as latin-1.
    return httpx.Headers({"Authorization": given} if given else {}, encoding="latin-1")


async def _body(request: Request) -> dict[str, Any]:
    """Return a JSON object.

    Other sites' pages cannot send JSON here: a browser would ask first, and nobody allows it.

    Raises:
        UserError: there is none, or one that is too large.
    """
    if request.headers.get("Content-Type", "").split(";")[0] != "application/json":
        raise UserError("Content-Type: application/json is wanted")
    content, size = bytearray(), 0
    async for piece in request.stream():  # to its end: browsers hear no answer before
        size += len(piece)
        if size <= _MAX_BYTES:
            content += piece
    if size > _MAX_BYTES:
        raise UserError(f"a conversation of {size} bytes is more than {_MAX_BYTES}; send less")
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UserError("a JSON object is wanted")
    return body


def _refused(message: str, code: str = "invalid_value", status: int = 400) -> Response:
    return JSONResponse({"error": {"message": message, "code": code}}, status)


def launch(arguments: ChatPageArguments) -> None:
    """Serve the page until interrupted, or until stdin closes where that is asked for.

    Raises:
        UserError: the port is in use.
    """
    listen(arguments.host, arguments.port, "port").close()
    client = ApiClient(arguments.api_url, arguments.api_certificate)
    page = ChatPage(client, arguments.title, arguments.root_path.rstrip("/"))
    certificate = arguments.ssl_certfile
    tls = None if certificate is None else Tls(certificate, arguments.ssl_keyfile)
    page.app.launch(
        server_name=arguments.host,
        server_port=arguments.port or None,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=1,  # nobody uploads anything
        enable_monitoring=False,
        ssr_mode=False,
        _frontend=False,
        ssl_certfile=arguments.ssl_certfile,
        ssl_keyfile=arguments.ssl_keyfile or arguments.ssl_certfile,
        ssl_verify=False,  # of the look at itself that Gradio takes first
    )
    blocks = page.app.get_blocks()
    if tls is not None:
        tls.follow(blocks.server.config.ssl)
    url = local_url(arguments.host, blocks.server_port, arguments.ssl_certfile is not None)
    sys.stderr.write(f"chat page ready: {url}\n")
    try:
        if arguments.until_stdin_closes:
            for _ in sys.stdin.buffer:  # the server was told to read its files again
                _reload(client, tls)
        else:
            blocks.block_thread()
    finally:
        page.close()
        blocks.close(verbose=False)


def _reload(client: ApiClient, tls: Tls | None) -> None:
    """Go by the certificates as their files have them now."""
    if tls is not None:
        tls.reload()
    try:
        client.reload()
    except OSError as error:
        sys.stderr.write(f"the API's certificate cannot be read again: {error}\n")


def main() -> None:
    """Read the arguments and serve the page."""
    (arguments,) = load((ChatPageArguments,), prog="llm.serving.page.ui", description=__doc__ or "")
    launch(arguments)


if __name__ == "__main__":
    run_script(main)
