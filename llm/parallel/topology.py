"""The running job: which process this is, and the groups it talks to.

Groups are fleet's. Where CPUs compute, the gloo adapter is loaded first, so that the launch line of
a cluster runs on a laptop: that is a rehearsal, whose numbers are those of the cluster's layout and
whose speed says nothing.
"""

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

from common.devices import CPU
from common.errors import UserError
from llm.parallel.layout import Coordinates, Layout

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """This process in a layout.

    Groups are paddle's, and None along axes of one rank.
    """

    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    tensor_group: Any = None
    pipeline_group: Any = None
    data_group: Any = None
    sharding_group: Any = None
    context_group: Any = None
    hybrid: Any = None  # fleet's HybridCommunicateGroup; None in one process

    @property
    def at(self) -> Coordinates:
        """The coordinates of this process."""
        return self.layout.coordinates(self.rank)

    @property
    def data_rank(self) -> int:
        """Which share of the samples this process takes: 0 … ``layout.data_ranks - 1``."""
        return self.at.data * self.layout.sharding + self.at.sharding

    @property
    def stage_first(self) -> bool:
        """Whether this process embeds tokens."""
        return self.at.pipeline == 0

    @property
    def stage_last(self) -> bool:
        """Whether this process scores the vocabulary."""
        return self.at.pipeline == self.layout.pipeline - 1

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.layout.world_size > 1:
            import paddle.distributed

            paddle.distributed.barrier()

    def gather_objects(self, item: Any) -> list[Any]:
        """Return the items of all processes, by rank."""
        if self.layout.world_size == 1:
            return [item]
        import paddle.distributed

        items: list[Any] = []
        paddle.distributed.all_gather_object(items, item)
        return items

    def agree(self, error: UserError | None) -> None:
        """Raise, in all processes, the error that the first of them has; all have to call it.

        Raises:
            UserError: one that any process gave.
        """
        if self.layout.world_size == 1:
            if error is not None:
                raise error
            return
        said = self.gather_objects(None if error is None else str(error))
        first = next((text for text in said if text is not None), None)
        if first is not None:
            raise UserError(first)


def single() -> Topology:
    """Return the topology of one process."""
    return Topology()


def start(
    layout: Layout, device: str = "cpu", *, options: dict[str, Any] | None = None
) -> Topology:
    """Join the other processes of the job.

    Args:
        layout: of the whole job; its ``world_size`` is what the launcher started.
        device: as ``--device`` takes it.
        options: fields of fleet's ``pp_configs`` and ``sharding_configs``, such as
            ``{"pp_configs": {"delay_scale_loss": True}}``.

    Raises:
        UserError: the launcher started another number of processes.
    """
    if layout.world_size == 1:
        return single()
    import paddle
    import paddle.distributed
    from paddle.distributed import fleet

    world = paddle.distributed.get_world_size()
    if world != layout.world_size:
        raise UserError(
            f"{layout.describe()} takes {layout.world_size} processes, launched: {world}"
        )
    rehearsal = device == CPU
    if rehearsal:
        from llm.parallel import gloo

        gloo.install()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {
        "dp_degree": layout.data,
        "mp_degree": layout.tensor,
        "pp_degree": layout.pipeline,
        "sharding_degree": layout.sharding,
        "sep_degree": layout.context,
    }
    for name, values in (options or {}).items():
        for key, value in values.items():
            setattr(strategy.hybrid_configs[name], key, value)
    with warnings.catch_warnings():
        # Every process has to take part in making groups that it is no member of.
        warnings.filterwarnings("ignore", message="Current global rank")
        fleet.init(is_collective=True, strategy=strategy)
    hybrid = fleet.get_hybrid_communicate_group()
    rank = paddle.distributed.get_rank()
    topology = Topology(layout, rank, *_groups(layout, hybrid), hybrid)
    if rehearsal and rank == 0:
        _log.warning(
            "rehearsal: %d processes on CPU over gloo compute what this layout computes on GPUs "
            "over NCCL (%s); the speed says nothing about GPUs",
            layout.world_size,
            layout.describe(),
        )
    return topology


def _groups(layout: Layout, hybrid: Any) -> list[Any]:
    """Return the groups in the order of :class:`Topology`; None along axes of one rank."""
    made = (
        (layout.tensor, hybrid.get_model_parallel_group),
        (layout.pipeline, hybrid.get_pipe_parallel_group),
        (layout.data, hybrid.get_data_parallel_group),
        (layout.sharding, hybrid.get_sharding_parallel_group),
        (layout.context, hybrid.get_sep_parallel_group),
    )
    return [group() if degree > 1 else None for degree, group in made]
