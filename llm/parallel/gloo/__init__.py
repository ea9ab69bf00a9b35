"""Paddle's fleet on processes without GPUs: what gloo lacks in Paddle 3.3.1's CPU wheel, filled in.

With it, tensor, pipeline, sharded and context parallel training run on the cores of one machine and
compute what they compute over NCCL, for tests and for rehearsals of a launch line. Nothing here is
reached on a CUDA build. Every collective first makes sure that all ranks of the group called the
same one (:mod:`llm.parallel.gloo.agreement`), so that mistakes are messages and not hangs.

* ``links``: TCP connections between the ranks of a group.
* ``members``: this process as a member of each group, and how groups come about.
* ``agreement``: who called what; mismatched, missing and dead ranks.
* ``collectives``, ``messages`` (point to point): the methods of ``ProcessGroupGloo``.
* ``operators``: the tensor parallel operators that have no CPU kernel.
* ``fleet``: Python helpers of fleet that assume a device.
"""

import os

from llm.parallel.gloo.errors import (
    CollectiveError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLostError,
)

__all__ = [
    "CollectiveError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "PeerLostError",
    "flush",
    "install",
]

# NCCL's default in paddle.distributed.new_group.
DEFAULT_TIMEOUT_S = 1800.0


def install(timeout_s: float | None = None) -> None:
    """Fill in what is missing; call it before ``fleet.init`` or ``init_parallel_env``.

    Does nothing on a CUDA build, and nothing but changing the timeout when called again.

    Args:
        timeout_s: how long a rank waits for the others in a collective; None takes the variable
            ``LLM_GLOO_TIMEOUT`` or 1800 seconds.
    """
    import paddle

    if paddle.is_compiled_with_cuda():
        return
    from llm.parallel.gloo import collectives, fleet, members, messages, operators

    members.set_timeout(timeout_s or float(os.environ.get("LLM_GLOO_TIMEOUT", DEFAULT_TIMEOUT_S)))
    if members.installed():
        return
    members.install()
    collectives.install()
    messages.install()
    operators.install()
    fleet.install()


def flush() -> None:
    """Return when everything that was sent has left this process; call it before a rank exits.

    Raises:
        PeerLostError: a receiver ended before it received.
    """
    import paddle

    if not paddle.is_compiled_with_cuda():
        from llm.parallel.gloo import messages

        messages.flush()
