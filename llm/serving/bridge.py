"""A WSGI application behind an ASGI server: threads run it, the event loop talks to its clients.

A thread is taken when a request is there as a whole, so that connections which are silent or slow
take none. While the application runs its client is watched: ``environ["llm.client_gone"]`` tells
whether it has left. Chunks are sent as soon as they are yielded; those that come while the loop is
busy go out together. What WSGI asks for: PEP 3333; what ASGI sends:
https://asgi.readthedocs.io/en/latest/specs/www.html
"""

import asyncio
import io
import json
import logging
import re
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llm.serving.errors import ApiError

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

GONE = "llm.client_gone"
_BODY_S = 60.0  # for a client to send its body; the refusal says a minute
_UNSENT_BYTES = 1 << 18  # an application waits for a client that reads more slowly
_CLOSE = (b"connection", b"close")
_ADDRESS = re.compile(r"\Ahttps?://[^/]*", re.IGNORECASE)


class Bridge:
    """An ASGI application that runs a WSGI one.

    Args:
        app: the WSGI application.
        threads: run requests that carry a body.
        probes: run those that carry none, which must not wait behind the others.
        max_body_bytes: of larger bodies the application is told the length alone.
    """

    def __init__(
        self,
        app: Wsgi,
        threads: ThreadPoolExecutor,
        probes: ThreadPoolExecutor,
        max_body_bytes: int,
    ) -> None:
        self._app, self._threads, self._probes = app, threads, probes
        self._max_body_bytes = max_body_bytes
        self._wakes: _Wakes | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            # A proxy may go by the other one, and take the rest for the next request.
            await _say(
                send, 400, "Content-Length and Transfer-Encoding both came; send one of them"
            )
            return
        try:
            body, length = await asyncio.wait_for(self._body(scope, receive), _BODY_S)
        except TimeoutError:
            await _say(send, 408, "the body has not come within a minute; send it at once")
            return
        except asyncio.CancelledError:
            await _say(send, 503, "the server stops before the body has come; try again later")
            return
        if body is None:
            return  # the client left
        whole = len(body) == length
        if self._wakes is None:
            self._wakes = _Wakes()
        exchange = _Exchange(self._wakes, send, close=not whole)
        environ = _environ(scope, body, length, exchange.gone)
        pool = self._threads if length else self._probes
        pool.submit(exchange.run, self._app, environ)
        watch = asyncio.create_task(exchange.watch(receive)) if whole else None
        try:
            await exchange.pump()
        except asyncio.CancelledError:  # the server stops, and the client does not read
            return
        finally:
            exchange.gone.set()
            exchange.sent.set()
            if watch is not None:
                watch.cancel()

    async def _body(self, scope: Message, receive: Receive) -> tuple[bytes | None, int]:
        """Return the body and its length; none where the client left, an empty one if too long."""
        length = _header(scope, b"content-length")
        if length is not None and int(length) > self._max_body_bytes:
            return b"", int(length)
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None, 0
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                return b"", size
            if not message.get("more_body"):
                return b"".join(parts), size


class _Wakes:
    """Tells the loop who has something to send: of many threads at once, in one go."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: deque[asyncio.Event] = deque()
        self._told = False

    def wake(self, one: asyncio.Event) -> None:
        """Set an event in the loop; from any thread.

        Raises:
            RuntimeError: the loop has ended.
        """
        self._due.append(one)
        if not self._told:  # else the loop has not begun to look, and will see this one, too
            self._told = True
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._told = False
        while self._due:
            self._due.popleft().set()


class _Exchange:
    """One request and its response, between the thread that runs it and the loop."""

    def __init__(self, wakes: _Wakes, send: Send, *, close: bool) -> None:
        self._wakes, self._send, self._close = wakes, send, close
        self._lock = threading.Lock()  # of the next four
        self._start: Message | None = None
        self._chunks: list[bytes] = []
        self._unsent = 0
        self._ended = False
        self._wake = asyncio.Event()
        self.gone, self.sent = threading.Event(), threading.Event()

    def run(self, app: Wsgi, environ: dict[str, Any]) -> None:
        """Run the application; in a thread."""
        try:
            chunks = app(environ, self._start_response)
            try:
                for chunk in chunks:
                    self._write(chunk)
                    if self.gone.is_set():
                        break
            finally:
                if (close := getattr(chunks, "close", None)) is not None:
                    close()
        except Exception:
            logger.exception("%s %s broke", environ["REQUEST_METHOD"], environ["PATH_INFO"])
            if self._start is None:
                self._start_response("500 ", [("Content-Type", "application/json")])
                self._write(error_body("internal error; the server's log has the details", 500))
        finally:
            self._tell(ended=True)

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        encoded = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in headers]
        if self._close:
            encoded.append(_CLOSE)
        self._start = {
            "type": "http.response.start",
            "status": int(status.split(" ", 1)[0]),
            "headers": encoded,
        }
        return self._write

    def _write(self, chunk: bytes) -> None:
        if chunk:
            self._tell(chunk)
            while self._unsent > _UNSENT_BYTES and not self.gone.is_set():
                self.sent.clear()
                if self._unsent > _UNSENT_BYTES:
                    self.sent.wait(1.0)

    def _tell(self, chunk: bytes = b"", *, ended: bool = False) -> None:
        with self._lock:
            told = bool(self._chunks) or self._ended  # the loop has not come to it yet
            if chunk:
                self._chunks.append(chunk)
                self._unsent += len(chunk)
            self._ended = self._ended or ended
        if not told:
            try:
                self._wakes.wake(self._wake)
            except RuntimeError:  # the loop has ended, with all its connections
                self.gone.set()

    async def pump(self) -> None:
        """Send what the application makes, to its end."""
        start: Message | None = None
        while True:
            await self._wake.wait()
            self._wake.clear()
            with self._lock:
                body, ended = b"".join(self._chunks), self._ended
                self._chunks.clear()
            if start is None:
                start = self._start
                assert start is not None
                await self._send(start)
            await self._send({"type": "http.response.body", "body": body, "more_body": not ended})
            self._unsent -= len(body)
            self.sent.set()
            if ended:
                return

    async def watch(self, receive: Receive) -> None:
        """Notice that the client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.set()
        self.sent.set()


def _header(scope: Message, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _environ(scope: Message, body: bytes, length: int, gone: threading.Event) -> dict[str, Any]:
    """Return what PEP 3333 asks for."""
    server, client = scope.get("server") or ("", 0), scope.get("client") or ("", 0)
    # A client that takes the server for its proxy names the whole address (RFC 9112, 3.2.2).
    path = _ADDRESS.sub("", scope["path"]) or "/"
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": path.encode().decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": server[0],
        "SERVER_PORT": str(server[1]),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "REMOTE_ADDR": client[0],
        "REMOTE_PORT": str(client[1]),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope["scheme"],
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
        GONE: gone.is_set,
    }
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").upper().replace("-", "_"), value.decode("latin-1")
        if b"_" in name or key in ("CONTENT_LENGTH", "TRANSFER_ENCODING"):
            continue  # "a_b" would pass for "a-b"; the body has come as a whole
        key = key if key == "CONTENT_TYPE" else f"HTTP_{key}"
        environ[key] = f"{environ[key]},{text}" if key in environ else text
    if length:
        environ["CONTENT_LENGTH"] = str(length)
    return environ


def error_body(message: str, status: int) -> bytes:
    """Return an error in OpenAI's shape, for what no route has seen."""
    return json.dumps(ApiError(message, status=status).openai_body()).encode()


async def _say(send: Send, status: int, message: str) -> None:
    headers = [(b"content-type", b"application/json"), _CLOSE]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": error_body(message, status)})
