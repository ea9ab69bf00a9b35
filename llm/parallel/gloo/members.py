"""This process as a member of each group.

``paddle/distributed/collective.py::_new_process_group_impl`` gives every gloo group the job's one
TCPStore, in which process_group_gloo.cc uses the same keys for all of them: groups that are made
close to each other connect to each other's ranks ("connection refused", "connection reset"). Here
every group has a store of its own, and is complete on all ranks before any of them goes on.
"""

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import paddle.distributed.collective as paddle_collective
import paddle.distributed.parallel as paddle_parallel
from paddle.base import core

from llm.parallel.gloo import agreement, links

_STORE_TIMEOUT_S = 900
_PORT_TRIES = 50
_PREFIX = "llm-gloo"

_members: dict[int, "Member"] = {}  # by id of the process group, which the member keeps alive
_state: dict[str, Any] = {}


@dataclass
class Member:
    """This process in a group of more than one.

    ``peers`` and ``jobs_ranks`` are by rank in the group: where a peer listens, and its rank in
    the whole job.
    """

    group: Any
    name: str
    rank: int
    peers: list[tuple[str, int]]
    jobs_ranks: list[int]
    store: Any
    arrivals: dict[int, socket.socket] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return len(self.peers)

    def __str__(self) -> str:
        return f"the group of ranks {self.jobs_ranks}"

    def title(self, rank: int) -> str:
        """How messages call a rank of the group: by its rank in the job, with its host."""
        return f"rank {self.jobs_ranks[rank]} ({self.peers[rank][0]})"


def member_of(group: Any) -> Member:
    """This process as a member of a process group."""
    return _members[id(group)]


def timeout_s() -> float:
    """How long a rank waits for others."""
    return float(_state["timeout"])


def set_timeout(seconds: float) -> None:
    """Set how long a rank waits for others."""
    _state["timeout"] = seconds


def listener() -> links.Listener:
    """Where other ranks connect to this process."""
    if "listener" not in _state:
        _state["listener"] = links.Listener()
    return _state["listener"]


def installed() -> bool:
    """Whether :func:`install` ran in this process."""
    return "native" in _state


def install() -> None:
    """Make groups of gloo through :func:`_new_member`, and wait for the store's server."""
    _state["native"] = native = paddle_collective._new_process_group_impl
    _state["global_store"] = core.create_or_get_global_tcp_store

    def new_group(
        backend: str, store: Any, rank: int, world_size: int, name: str, *others: Any, **named: Any
    ) -> Any:
        if backend != "gloo":
            return native(backend, store, rank, world_size, name, *others, **named)
        group_id = named.get("group_id", others[1] if len(others) > 1 else 0)
        return _new_member(store, rank, world_size, name, group_id).group

    # parallel.py imported the function by name.
    paddle_collective._new_process_group_impl = new_group
    paddle_parallel._new_process_group_impl = new_group
    core.create_or_get_global_tcp_store = _global_store


def _global_store() -> Any:
    """Wait for rank 0 first: a refused connection costs three seconds of sleep in tcp_utils.cc."""
    if int(os.environ.get("PADDLE_TRAINER_ID", "0")) > 0:
        host, port = _master().rsplit(":", 1)
        end = time.monotonic() + _STORE_TIMEOUT_S
        while time.monotonic() < end:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((host, int(port))) == 0:
                    break
            time.sleep(0.02)
    return _state["global_store"]()


def _master() -> str:
    """Where paddle looks for the store of the job (parallel.py, init_parallel_env)."""
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    return os.environ.get("PADDLE_MASTER") or endpoints[0]


def _new_member(store: Any, rank: int, size: int, name: str, group_id: int) -> Member:
    own = links.own_host()
    port = 0
    if rank == 0:
        private, port = _serve_store(own)
    job_rank = int(os.environ["PADDLE_TRAINER_ID"])
    introduction = f"{own} {listener().port} {job_rank} {port}"
    store.set(f"{_PREFIX}/{name}/{rank}", introduction.encode())
    known = [bytes(store.get(f"{_PREFIX}/{name}/{peer}")).decode().split() for peer in range(size)]
    if rank:
        private = core.TCPStore(known[0][0], int(known[0][3]), False, 0, _STORE_TIMEOUT_S)
    member = Member(
        None,
        name,
        rank,
        [(host, int(listening)) for host, listening, _, _ in known],
        [int(peer) for _, _, peer, _ in known],
        private,
    )
    agreement.open_links(member)
    member.group = core.ProcessGroupGloo.create(private, rank, size, group_id)
    # The owner of the store may not go on, and end, before all ranks are connected.
    agreement.agree(member, "new_group")
    _members[id(member.group)] = member
    return member


def _serve_store(host: str) -> tuple[Any, int]:
    """A store on a free port; another process may take the port between finding and using it."""
    for attempt in range(_PORT_TRIES):
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        try:
            return core.TCPStore(host, port, True, 0, _STORE_TIMEOUT_S), port
        except RuntimeError:
            if attempt == _PORT_TRIES - 1:
                raise
    raise AssertionError("unreachable")
