"""The HTTP server around the applications: uvicorn, on sockets that are bound already.

Of the servers that were tried (docs/log.md) it is the one that holds connections in an event loop,
so that a thousand of them, silent or slow, cost no thread, and that speaks TLS. Flask's routes run
in threads behind :mod:`llm.serving.bridge`.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import resource
import socket
import ssl
import sys
import termios
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from llm.serving.bridge import Bridge, Wsgi, error_body

logger = logging.getLogger(__name__)

# Threads beyond those of requests that run or wait, so that refusals never wait.
_SPARE_THREADS = 4
_KEEP_ALIVE_S = 75
_HEAD_S = 60.0  # for a request's head to come; the refusal says a minute
_HEADER_BYTES = 1 << 16
_READING_S, _READ_BYTES = 60.0, 1 << 14  # what a client has to take of its answer in which time
_STOP_S = 3.0
_FILES = 1 << 16  # open connections, if the system allows


class _Protocol(H11Protocol):
    """What is no HTTP is refused in JSON, like all that is refused; nobody holds a connection.

    Heads have to come in time, and answers have to be taken: a thread waits for who takes them.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._time_head()
        self._time_reading(None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_reading(self._unread())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._time_reading(None)

    def _unread(self) -> int:
        """Return the bytes that wait for the client, here and in the kernel.

        The kernel takes more only when a third of its buffer, which grows to megabytes, is free.
        """
        kernel = bytearray(4)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, kernel)
        return self.transport.get_write_buffer_size() + int.from_bytes(kernel, sys.byteorder)

    def _time_reading(self, unread: int | None) -> None:
        """Begin to wait for a client to take what is unread, or leave off."""
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None
        if unread is not None:
            self._reading_timer = self.loop.call_later(_READING_S, self._look_at_reading, unread)

    def _look_at_reading(self, before: int) -> None:
        unread = self._unread()
        if before - unread < _READ_BYTES:
            self.transport.abort()  # which ends its request, as when it leaves
        else:
            self._time_reading(unread)

    def handle_events(self) -> None:
        super().handle_events()
        self._time_head()

    def _time_head(self) -> None:
        """Begin to wait for a head that has begun, or for the first one; leave off where none is.

        Between two requests uvicorn waits for the second, but only until its first byte.
        """
        first = self.cycle is None
        begun = bool(self.conn.trailing_data[0]) and self.conn.their_state is h11.IDLE
        waits = not self.transport.is_closing() and (first or begun)
        if waits and self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_S, self._head_is_late)
        elif not waits and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(408, "the request has not come within a minute; send it at once")
        else:
            self.transport.close()  # one that is kept for later, and nobody asks

    def send_400_response(self, msg: str) -> None:
        fault = sys.exception()  # uvicorn has caught it, and says nothing of it
        if not isinstance(fault, h11.RemoteProtocolError):
            self._refuse(400, msg)
        elif fault.error_status_hint == 431:
            self._refuse(431, f"the request's head is longer than {_HEADER_BYTES} bytes; send less")
        else:
            self._refuse(400, f"this is no HTTP request: {fault}")

    def _refuse(self, status: int, message: str) -> None:
        """Answer what has not become a request, and hang up."""
        body = error_body(message, status)
        headers = [
            (b"content-type", b"application/json; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            events = h11.Response(status_code=status, headers=headers), h11.Data(body)
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


@dataclass(frozen=True)
class Site:
    """An application and where it listens.

    Args:
        app: the WSGI application.
        listening: see :func:`llm.serving.listening.listen`.
        tls: None for plain HTTP.
    """

    app: Wsgi
    listening: socket.socket
    tls: ssl.SSLContext | None = None

    @property
    def port(self) -> int:
        """The port, also where a free one was asked for."""
        port: int = self.listening.getsockname()[1]
        return port


class HttpServer:
    """Answers for several sites from :meth:`start` on; connections before that wait.

    Args:
        sites: applications, each on a socket of its own.
        max_requests: that may run or wait; sets the number of threads.
        max_body_bytes: of longer bodies an application is told the length alone.
    """

    def __init__(self, sites: Sequence[Site], *, max_requests: int, max_body_bytes: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
        self._pools = (
            ThreadPoolExecutor(max_requests + _SPARE_THREADS, thread_name_prefix="request"),
            ThreadPoolExecutor(_SPARE_THREADS, thread_name_prefix="probe"),
        )
        self._sites = sites
        self._servers = [
            Server(_settings(Bridge(site.app, *self._pools, max_body_bytes), site.tls))
            for site in sites
        ]
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Serve in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Let running requests end for a moment (the worker is closed first), then close."""
        for server in self._servers:
            server.should_exit = True
        self._thread.join(2 * _STOP_S)
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        async def serve() -> None:
            asyncio.get_running_loop().set_exception_handler(_Faults())
            pairs = zip(self._servers, self._sites, strict=True)
            await asyncio.gather(*(one.serve(sockets=[site.listening]) for one, site in pairs))

        asyncio.run(serve())


class _Faults:
    """What asyncio says of its own, but of files that have run out a line a minute.

    It says that of each try, with its stack, and tries a thousand times a second.
    """

    _OUT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
    _EVERY_S = 60.0

    def __init__(self) -> None:
        self._said = -self._EVERY_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in self._OUT:
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said >= self._EVERY_S:
            self._said = time.monotonic()
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            logger.error(
                "no more connections are taken until others end: %s; %d files may be open "
                "(ulimit -Hn, or LimitNOFILE of the systemd unit)",
                error.strerror,
                most,
            )


def _settings(app: Bridge, tls: ssl.SSLContext | None) -> Config:
    return Config(
        app,
        interface="asgi3",
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=1024,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(_STOP_S),
        h11_max_incomplete_event_size=_HEADER_BYTES,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
