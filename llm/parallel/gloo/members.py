"""This process as a member of each group, and how groups come about.

``paddle/distributed/collective.py::_new_process_group_impl`` gives every gloo group the job's one
TCPStore, in which process_group_gloo.cc uses the same keys for all of them: groups that are made
close to each other connect to each other's ranks ("connection refused", "connection reset"). The
store also polls, which takes seconds where fleet makes ten groups. Here it only passes addresses.
"""

import os
import socket
import time
from typing import Any

from paddle.base import core

from llm.parallel.gloo import links, rounds
from llm.parallel.gloo.links import Member, listener, timeout_s

_STORE_TIMEOUT_S = 900
_PREFIX = "llm-gloo"


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
    rounds.open_links(member, listener(), timeout_s())
    rounds.agree(member, "new_group")
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
