"""Addresses to listen on, and as this machine reaches them."""

import errno
import socket

from common.errors import UserError


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


def mounts() -> dict[str, None]:
    """Return httpx's ``mounts`` by which this machine is asked itself, whatever proxy is set."""
    return {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}


def local_url(host: str, port: int, tls: bool = False) -> str:
    """Return the address under which this machine reaches a server that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{name}:{port}"
