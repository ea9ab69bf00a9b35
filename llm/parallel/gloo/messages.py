"""Point-to-point messages: ``send``, ``recv`` and their asynchronous and batched forms.

Native gloo blocks a sender until the receiver is there, so that pipelines and rings deadlock, and
its tags are per group and not per pair of ranks (see ``links``). Here a message is copied and sent
by a thread, as NCCL's stream would do it, and carries its type and size, which the receiver checks.
"""

import queue
import socket
import threading
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from llm.parallel.gloo import links
from llm.parallel.gloo.links import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    Member,
    PeerLostError,
    listener,
    timeout_s,
)
from llm.parallel.gloo.tensors import DONE, Done, array_of, array_type, put, put_array

_PURPOSE = "messages"


class _Outbox:
    """What this rank sends to one other rank of a group, in order."""

    def __init__(self, member: Member, peer: int) -> None:
        self._title = member.title(peer)
        self._address = member.peers[peer]
        self._key = (member.label, _PURPOSE, member.index)
        self._queue: queue.Queue[tuple[Any, np.ndarray]] = queue.Queue()
        self._error: OSError | None = None
        threading.Thread(target=self._run, name=f"gloo-to-{peer}", daemon=True).start()

    def _run(self) -> None:
        link: socket.socket | None = None
        while True:
            header, values = self._queue.get()
            try:
                if self._error is None:
                    link = link or links.connect(self._address, self._key)
                    links.send(link, header, links.as_bytes(values))
            except OSError as error:
                self._error = error
            self._queue.task_done()

    def post(self, header: Any, values: np.ndarray) -> None:
        self.check()
        self._queue.put((header, values))

    def flush(self) -> None:
        self._queue.join()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise PeerLostError(f"send to {self._title}: it ended ({self._error})")


class Receive(Done):
    """A receive that was asked for; it happens when someone waits, in the order of asking."""

    def __init__(self, member: Member, tensor: Tensor, src: int, tag: str) -> None:
        self.message = (member, tensor, src, tag)
        self.waiting = _inbox(member, src)
        self.waiting.append(self)

    def wait(self, *_: Any) -> bool:
        """Receive this and what was asked for before it from the same rank."""
        while self in self.waiting:
            _receive(*self.waiting.pop(0).message)
        return True

    def is_completed(self) -> bool:
        """Whether it has happened."""
        return self not in self.waiting

    def synchronize(self) -> None:
        """Wait."""
        self.wait()


_outboxes: dict[tuple[str, int], _Outbox] = {}
_inboxes: dict[tuple[str, int], list[Receive]] = {}
_incoming: dict[tuple[str, int], socket.socket] = {}
_batches: list[list[Receive]] = []


def _inbox(member: Member, src: int) -> list[Receive]:
    return _inboxes.setdefault((member.label, src), [])


def post(member: Member, tensor: Tensor, dst: int, tag: str) -> None:
    """Queue a copy of ``tensor`` for rank ``dst`` of the group."""
    key = (member.label, dst)
    if key not in _outboxes:
        _outboxes[key] = _Outbox(member, dst)
    values = array_of(tensor)
    _outboxes[key].post([tag, str(tensor.dtype), int(tensor.size)], values)


def take(member: Member, tensor: Tensor, src: int, tag: str) -> None:
    """Receive into ``tensor`` from rank ``src`` of the group."""
    Receive(member, tensor, src, tag).wait()


def _receive(member: Member, tensor: Tensor, src: int, tag: str) -> None:
    title = member.title(src)
    try:
        link = _link(member, src)
        header = links.receive(link)
        expected = [tag, str(tensor.dtype), int(tensor.size)]
        if header != expected:
            raise CollectiveMismatchError(
                f"{tag} in {member}: {title} sent {header}, expected {expected} "
                "(operation, data type, size)"
            )
        values = np.empty(tensor.size, array_type(tensor))
        links.receive_into(link, links.as_bytes(values))
    except TimeoutError as late:
        raise CollectiveTimeoutError(
            f"{tag} in {member}: nothing came from {title} within {timeout_s():g} s"
        ) from late
    except EOFError as lost:
        raise PeerLostError(
            f"{tag} in {member}: {title} ended; see its log for the cause"
        ) from lost
    put_array(tensor, values)


def _link(member: Member, src: int) -> socket.socket:
    key = (member.label, src)
    if key not in _incoming:
        _incoming[key] = listener().take((member.label, _PURPOSE, src), timeout_s())
        _incoming[key].settimeout(timeout_s())
    return _incoming[key]


def flush() -> None:
    """Return when all that was sent has left this process."""
    for outbox in _outboxes.values():
        outbox.flush()


def part_of(tensor: Tensor, parts: int, part: int) -> Tensor:
    """One of ``parts`` equal pieces of a tensor's numbers."""
    size = tensor.size // parts
    return tensor.reshape([-1])[part * size : (part + 1) * size]


def send(group: Member, tensor: Tensor, dst: int, sync_op: bool = True) -> Done:
    """Send to rank ``dst`` of the group; the tensor may change as soon as this returns."""
    post(group, tensor, dst, "send")
    return DONE


def recv(group: Member, tensor: Tensor, src: int, sync_op: bool = True) -> Done:
    """Receive from rank ``src`` of the group; within a batch, at its end."""
    receive = Receive(group, tensor, src, "send")
    return _start(receive, sync_op)


def _start(receive: Receive, sync_op: bool) -> Done:
    """Receive now if this is the time; return what the caller may wait for."""
    if _batches:
        _batches[-1].append(receive)
        return DONE if sync_op else receive  # paddle waits for blocking ones within the batch
    if sync_op:
        receive.wait()
    return receive


def send_partial(
    group: Member, tensor: Tensor, dst: int, parts: int, part: int, sync_op: bool = True
) -> Done:
    """Send one of ``parts`` equal pieces: tensor parallel ranks share out the work."""
    return send(group, part_of(tensor.detach(), parts, part), dst)


class _ReceivePart(Receive):
    """A receive of one piece of a tensor."""

    def __init__(self, member: Member, tensor: Tensor, src: int, parts: int, part: int) -> None:
        self._target, self._part = tensor, part
        piece = paddle.empty([tensor.size // parts], tensor.dtype)
        super().__init__(member, piece, src, "send")

    def wait(self, *_: Any) -> bool:
        """Receive, and put the piece in its place."""
        super().wait()
        _, piece, _, _ = self.message
        start = self._part * piece.size
        whole = self._target.detach().reshape([-1]).clone()
        whole[start : start + piece.size] = piece
        put(self._target, whole)
        return True


def recv_partial(
    group: Member, tensor: Tensor, src: int, parts: int, part: int, sync_op: bool = True
) -> Done:
    """Receive one of ``parts`` equal pieces into its place."""
    return _start(_ReceivePart(group, tensor, src, parts, part), sync_op)


def start_batch(group: Member, *_: Any) -> None:
    """From here on receives are only noted, so that all sends of a batch are under way first."""
    _batches.append([])


def end_batch(group: Member, *_: Any) -> None:
    """Receive what the batch asked for."""
    for receive in _batches.pop():
        receive.wait()
