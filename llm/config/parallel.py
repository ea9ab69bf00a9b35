"""Arguments of parallelism: how the processes of a training job share its work."""

from dataclasses import dataclass

from common.flags import arg
from llm.parallel.layout import CONTEXT_KINDS, Layout
from llm.parallel.rules import launched, resolve

OFFLOAD = ("off", "static", "auto")


@dataclass
class ParallelArguments:
    """Degrees of parallelism, and what a process keeps in memory."""

    tensor_parallel_degree: int = arg(
        1,
        "ranks that split every matrix; -1 is 1",
        minimum=-1,
        aliases=("tensor_model_parallel_size",),
    )
    sequence_parallel: bool = arg(
        False,
        "tensor parallel ranks also split the sequence between the matrices",
        only_with="tensor_parallel_degree>1",
    )
    pipeline_parallel_degree: int = arg(
        1,
        "stages of layers; -1 is 1",
        minimum=-1,
        aliases=("pipeline_model_parallel_size",),
    )
    virtual_pp_degree: int = arg(1, "chunks of layers in each stage (interleaving)", minimum=1)
    pipeline_parallel_config: str = arg(
        "",
        "PaddleNLP's words for the pipeline, such as disable_p2p_cache_shape",
    )
    sharding: str = arg(
        "",
        "stage1 splits the optimizer's state over processes, stage2 gradients too, stage3 weights "
        "too; with the word offload, that state lies in host memory",
    )
    sharding_parallel_degree: int = arg(
        -1, "processes that sharding splits over; -1 is all that remain", minimum=-1
    )
    data_parallel_degree: int = arg(
        -1, "processes with the same weights and other samples; -1 is all that remain", minimum=-1
    )
    context_parallel_degree: int = arg(
        1, "ranks that split every sequence; -1 is 1 (see context_parallel_kind)", minimum=-1
    )
    context_parallel_kind: str = arg(
        "ring",
        "ring passes keys and values around, ulysses exchanges heads for tokens",
        choices=CONTEXT_KINDS,
        only_with="context_parallel_degree>1",
    )
    sep_parallel_degree: int = arg(
        1, "the same as context_parallel_degree with ulysses; -1 is 1", minimum=-1
    )
    offload_optim: str = arg(
        "off",
        "keep the optimizer's state in host memory: static always, auto where it would not fit",
        choices=OFFLOAD,
    )
    overlap_communication: bool = arg(
        False,
        "sum gradients in buckets while the last backward pass goes on, bring sharded weights and "
        "offloaded state before they are needed; the same numbers, rehearsed and not run on a GPU",
        only_with="do_train",
    )

    @property
    def layout(self) -> Layout:
        """The layout that the flags ask for, over the processes that were launched.

        Raises:
            UserError: a layout that is impossible, with one that fits.
        """
        return resolve(self, launched())

    @property
    def offload_mode(self) -> str:
        """Where the optimizer's state lies: one of :data:`OFFLOAD`."""
        return "static" if "offload" in self.sharding.split() else self.offload_optim
