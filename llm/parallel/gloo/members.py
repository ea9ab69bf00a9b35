"""This process as a member of each group, and how groups come about.

``paddle/distributed/collective.py::_new_process_group_impl`` gives every gloo group the job's one
TCPStore, in which process_group_gloo.cc uses the same keys for all of them: groups that are made
close to each other connect to each other's ranks ("connection refused", "connection reset"). The
store also polls, which takes seconds where fleet makes ten groups. Here it only passes addresses.
"""

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from paddle.base import core

from llm.parallel.gloo import exchange, links

_STORE_TIMEOUT_S = 900
_PREFIX = "llm-gloo"


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


class _Process:
    """What all groups of this process share."""

    timeout_s: float = 0.0
    listener: links.Listener | None = None


def timeout_s() -> float:
    """How long a rank waits for others."""
    return _Process.timeout_s


def set_timeout(seconds: float) -> None:
    """Set how long a rank waits for others."""
    _Process.timeout_s = seconds


def listener() -> links.Listener:
    """Where other ranks connect to this process."""
    if _Process.listener is None:
        _Process.listener = links.Listener()
    return _Process.listener


def join(group: type[Member], store: Any, rank: int, size: int, label: str) -> Any:
    """Make this process a member of a group; returns when all of its ranks are.

    Args:
        group: the class of the result.
        store: the job's TCPStore.
        rank: of this process in the group.
        size: number of ranks in the group.
        label: the group's name.
    """
    own = f"{links.own_host()} {listener().port} {os.environ['PADDLE_TRAINER_ID']}"
    store.set(f"{_PREFIX}/{label}/{rank}", own.encode())
    known = [bytes(store.get(f"{_PREFIX}/{label}/{peer}")).decode().split() for peer in range(size)]
    peers = [(host, int(port)) for host, port, _ in known]
    member = group(label, rank, peers, [int(job_rank) for _, _, job_rank in known])
    exchange.open_links(member, listener(), timeout_s())
    exchange.agree(member, "new_group")
    return member


_native_global_store = core.create_or_get_global_tcp_store


def global_store() -> Any:
    """The job's TCPStore; waits for rank 0, since a refused connection costs 3 s (tcp_utils.cc)."""
    if int(os.environ.get("PADDLE_TRAINER_ID", "0")) > 0:
        host, port = _master().rsplit(":", 1)
        end = time.monotonic() + _STORE_TIMEOUT_S
        while time.monotonic() < end:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((host, int(port))) == 0:
                    break
            time.sleep(0.02)
    return _native_global_store()


def _master() -> str:
    """Where paddle looks for the store of the job (parallel.py, init_parallel_env)."""
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    return os.environ.get("PADDLE_MASTER") or endpoints[0]
