"""TCP connections between ranks, from the bytes on them to the links of a group.

A frame is a header and bytes; each process listens in one place, where others say what a connection
is for; a :class:`Member` has the links of one group.

Native gloo takes a second to connect a group of four (its store polls), gives up after 30 seconds
in which a rank is late (it writes a checkpoint, say), reports a dead rank as a failed read, and
hands out message tags per group where they should be per pair of ranks (process_group_gloo.cc), so
that in a group of more than two the collective after a message hangs. Nothing of that here.
"""

import json
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_LENGTH = struct.Struct("!I")
_HELLO_S = 30.0
_SMALL = 1 << 16  # bytes

Key = tuple[str, str, int]  # group name, purpose, rank in the group of who connected


class CollectiveError(ValueError):
    """Ranks of a group failed to communicate."""


class CollectiveMismatchError(CollectiveError):
    """Ranks of a group called different collectives, or the same one with other sizes."""


class CollectiveTimeoutError(CollectiveError):
    """A rank did not arrive at a collective in time."""


class PeerLostError(CollectiveError):
    """A rank ended while another one waited for it."""


def send(link: socket.socket, header: Any, payload: Any = b"") -> None:
    """Send a frame: a JSON-able header, and bytes whose number the receiver knows from it."""
    text = json.dumps(header).encode()
    head = _LENGTH.pack(len(text)) + text
    if len(payload) <= _SMALL:  # in one call: nobody wakes up for half of it
        link.sendall(head + bytes(payload))
    else:
        link.sendall(head)
        link.sendall(payload)


def as_bytes(values: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(values.reshape(-1).view(np.uint8))


def receive(link: socket.socket) -> Any:
    """Receive a frame's header.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: nothing came within the link's timeout.
    """
    head = bytearray(_LENGTH.size)
    receive_into(link, memoryview(head))
    text = bytearray(_LENGTH.unpack(head)[0])
    receive_into(link, memoryview(text))
    return json.loads(text)


def receive_into(link: socket.socket, buffer: memoryview) -> None:
    """Fill ``buffer`` with a frame's bytes; raises as :func:`receive` does."""
    while len(buffer):
        try:
            count = link.recv_into(buffer)
        except ConnectionError as lost:
            raise EOFError(str(lost)) from lost
        if count == 0:
            raise EOFError("the connection was closed")
        buffer = buffer[count:]


def own_host() -> str:
    """The address at which the launcher knows this process."""
    endpoint = os.environ.get("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:0")
    return endpoint.rpartition(":")[0]


class Listener:
    """Where other ranks connect to this process, each saying what the connection is for."""

    def __init__(self) -> None:
        self._socket = socket.create_server((own_host(), 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self._arrived: dict[Key, socket.socket] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._accept_all, name="gloo-listener", daemon=True).start()

    def _accept_all(self) -> None:
        while True:
            link, _ = self._socket.accept()
            link.settimeout(_HELLO_S)
            try:
                name, purpose, rank = receive(link)
            except (OSError, ValueError):  # a stranger, such as a port scanner
                link.close()
                continue
            _prepare(link)
            with self._changed:
                self._arrived[name, purpose, rank] = link
                self._changed.notify_all()

    def take(self, key: Key, timeout: float) -> socket.socket:
        """Return the connection that a rank made for ``key``; waits for it.

        Raises:
            TimeoutError: it did not come.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._arrived, timeout):
                raise TimeoutError(f"no connection for {key} within {timeout:g} s")
            return self._arrived.pop(key)


def connect(address: tuple[str, int], key: Key) -> socket.socket:
    """Connect to a rank's listener and say what for."""
    link = socket.create_connection(address, timeout=_HELLO_S)
    _prepare(link)
    send(link, key)
    return link


def _prepare(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Between hosts something on the way may forget connections that are quiet for long.
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class _Process:
    """What all groups of this process share."""

    timeout_s: float = 0.0
    listener: Listener | None = None


def timeout_s() -> float:
    """How long a rank waits for others."""
    return _Process.timeout_s


def set_timeout(seconds: float) -> None:
    """Set how long a rank waits for others."""
    _Process.timeout_s = seconds


def listener() -> Listener:
    """Where other ranks connect to this process."""
    if _Process.listener is None:
        _Process.listener = Listener()
    return _Process.listener


@dataclass
class Member:
    """This process in a group.

    Args:
        label: the group's name, the same on all of its ranks and of no other group.
        index: this process's rank in the group.
        peers: where the ranks of the group listen.
        job_ranks: the ranks' ranks in the whole job.
        links: connections for collectives, by rank in the group: all on rank 0, to it elsewhere.
    """

    label: str
    index: int
    peers: list[tuple[str, int]]
    job_ranks: list[int]
    links: dict[int, socket.socket] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"the group of ranks {self.job_ranks}"

    def title(self, rank: int) -> str:
        """How messages call a rank of the group: by its rank in the job, with its host."""
        return f"rank {self.job_ranks[rank]} on {self.peers[rank][0]}"
