"""waitress around the API: binding, running beside the main thread, ending cleanly.

What was read in waitress 3.0.2 and is relied on: a chunk that the application yields is sent at
once (tests/e2e/test_server_http.py measures it), and a client that leaves is only
noticed while its request runs when ``channel_request_lookahead`` is above 0, because the socket is
not watched for reading otherwise.
"""

import errno
import socket
import threading

from flask import Flask
from waitress import wasyncore
from waitress.server import create_server

from common.errors import UserError

# Threads beyond those of requests that run or wait, so that /health and refusals never wait.
_SPARE_THREADS = 4


class HttpServer:
    """Listens from construction on; answers from :meth:`start` on.

    Args:
        app: the WSGI application.
        host: address to listen on.
        port: 0 takes a free one; see :attr:`port`.
        max_requests: that may run or wait; sets the number of threads.
        max_body_bytes: limit that the application reports itself.

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """

    def __init__(
        self, app: Flask, *, host: str, port: int, max_requests: int, max_body_bytes: int
    ) -> None:
        listening = listen(host, port, "flask_port")
        threads = max_requests + _SPARE_THREADS
        self._server = create_server(
            app,
            sockets=[listening],
            threads=threads,
            channel_request_lookahead=1,
            connection_limit=threads + 200,
            # Larger bodies are refused with JSON by the application; this only bounds what is
            # read before that.
            max_request_body_size=8 * max_body_bytes,
            ident=None,
            clear_untrusted_proxy_headers=True,
            asyncore_use_poll=True,
        )
        self.port: int = listening.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)

    def start(self) -> None:
        """Serve in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Let running requests end (the worker is closed first), then close every connection."""
        self._server.task_dispatcher.shutdown()
        # In the loop's own thread: closing sockets under a running poll() is a race.
        self._server.trigger.pull_trigger(lambda: wasyncore.close_all(self._server._map))
        self._thread.join(5.0)


def listen(host: str, port: int, flag: str) -> socket.socket:
    """Bind and listen.

    Raises:
        UserError: names the flag, the address and the fix.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"host={host!r} is not an address of this machine: {error}") from error
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"{flag}={port} is in use on {host}; stop what listens there, or choose another "
                f"with --{flag}"
            ) from error
        raise UserError(f"cannot listen on {host}, {flag}={port}: {error.strerror}") from error
    return listening


def local_url(host: str, port: int) -> str:
    """Return the address under which this machine reaches a server that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
