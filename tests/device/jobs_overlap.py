"""Trains with communication beside computation on the rehearsal device, which shows a lost wait."""

from typing import Any

from llm.parallel import sharding, sums
from llm.parallel import topology as topologies
from llm.parallel.layout import Layout
from tests.distributed.jobs_equality import changed, train

# For sums of gradients; for weights of other ranks, as layers compute; and whenever else they are
# asked for.
WAITS = {
    "sums": (sums, "wait"),
    "weights": (sharding, "wait"),
    "settle": (sharding.Sharding, "settle"),
}


def _forget(_: Any) -> None:
    """Stand where a wait was."""


def trained(layout: dict[str, Any], case: dict[str, Any], forgotten: str = "") -> float:
    """Return how many losses, norms and weights overlap changes in any bit.

    Args:
        layout: fields of :class:`Layout`.
        case: as in tests/distributed/test_equality.py.
        forgotten: one of :data:`WAITS`, which is left out with overlap; or nothing.
    """
    topology = topologies.start(Layout(**layout), "gpu")
    plain = train(topology, case)
    if forgotten:
        where, name = WAITS[forgotten]
        setattr(where, name, _forget)
    return changed(train(topology, case, overlap=True), plain)
