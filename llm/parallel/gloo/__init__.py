"""Paddle's fleet on processes without GPUs, for tests and for rehearsals of a launch line.

Tensor, pipeline, sharded and context parallel training then compute on the cores of a machine what
they compute over NCCL. In Paddle 3.3.1 fleet's own backend for that, ``ProcessGroupGloo``, cannot:
half of its collectives are missing, some are wrong, and mistakes hang (the modules say which). This
package takes its place, under its name, wherever processes compute on a CPU: with a CUDA build of
Paddle too, which would take NCCL.

* ``links``: TCP connections between ranks, and the errors of ranks that fail to communicate.
* ``members``: this process in each group.
* ``rounds``: the round trip of a collective, which finds mismatched, late and dead ranks.
* ``collectives``, ``messages`` (point to point), ``process_group``: what paddle calls;
  ``tensors`` moves numbers between it and the links.
* ``operators``: tensor parallel operators that have no CPU kernel, helpers that assume a device.

``paddle.DataParallel`` is the one thing that does not work: its reducer is C++ and wants a C++
group. ``fused_allreduce_gradients`` does the same.
"""

import os

from llm.parallel.gloo.links import (
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

_installed = False


def install(timeout_s: float | None = None) -> None:
    """Take the place of gloo; call it before ``fleet.init`` or ``init_parallel_env``.

    Does nothing but setting the timeout when called again.

    Args:
        timeout_s: how long a rank waits for the others in groups that are made from here on; None
            takes the variable ``LLM_GLOO_TIMEOUT`` or 1800 seconds.
    """
    from llm.parallel.gloo import links, operators, process_group

    links.set_timeout(timeout_s or float(os.environ.get("LLM_GLOO_TIMEOUT", DEFAULT_TIMEOUT_S)))
    global _installed  # noqa: PLW0603
    os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    if not _installed:
        process_group.install()
        operators.install()
        _installed = True


def flush() -> None:
    """Return when everything that was sent has left this process; call it before a rank exits.

    Raises:
        PeerLostError: a receiver ended before it received.
    """
    if _installed:
        from llm.parallel.gloo import messages

        messages.flush()
