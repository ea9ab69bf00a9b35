"""What the planner prints."""

from collections.abc import Sequence

from llm.planner.prediction import OUTSIDE, Prediction
from llm.planner.workload import Hardware

_HEADINGS = (
    "layout",
    "micro x acc.",
    "recompute",
    "GB",
    "bubble",
    "s/update",
    "tokens/s/GPU",
    "MFU",
)


def gigabytes(amount: float) -> str:
    """Return bytes in GB of 10**9: one decimal, or three digits of less than one GB."""
    return f"{amount / 1e9:.1f}" if amount >= 1e9 or amount == 0 else f"{amount / 1e9:.3g}"


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def utilization(found: Prediction, hardware: Hardware) -> float:
    """Return model FLOPs per second, recomputing not counted, over the device's peak."""
    peak = hardware.half if found.work.half else hardware.single
    flops = found.shape.flops_per_token(found.work.seq_length)
    if found.work.frozen:
        flops *= 2 / 3  # frozen weights have no gradient
    return found.tokens_per_second * flops / peak


def summary(found: Prediction) -> str:
    """Return what a run is and what each stage of it holds."""
    shape, layout, work = found.shape, found.layout, found.work
    lines = [
        f"model: {shape.num_parameters / 1e9:.3g} billion parameters, "
        f"{shape.flops_per_token(work.seq_length) / 1e9:.3g} GFLOP a token",
        f"layout: {layout.describe()}: {layout.world_size} processes",
        f"update: {work.micro_batch} rows x {work.accumulation} micro-batches x "
        f"{layout.data_ranks} replicas x {work.seq_length} tokens = {found.tokens_per_step:,}; "
        f"{work.precision}{' ' + work.level if work.half else ''}, recompute: {work.recompute}",
        "",
        _stages(found),
        "",
        f"bubble: {found.bubble:.1%}",
        "sent by a rank in an update, GB: "
        + (", ".join(f"{axis} {gigabytes(size)}" for axis, size in _volumes(found)) or "nothing"),
    ]
    return "\n".join(lines)


def timing(found: Prediction, hardware: Hardware, device_bytes: float) -> str:
    """Return what a run takes on a device."""
    seconds = found.seconds
    assert seconds is not None
    return "\n".join(
        [
            f"an update on {hardware.name}: {seconds.total:.2f} s (matrix products "
            f"{seconds.products:.2f}, memory {seconds.memory:.2f}, bubble {seconds.bubble:.2f}, "
            f"communication {seconds.communication:.2f}, optimizer {seconds.update:.2f}); "
            f"{found.tokens_per_second:,.0f} tokens/s/GPU, MFU {utilization(found, hardware):.0%}",
            f"without overlap {seconds.in_turn:.2f} s, with --overlap_communication "
            f"{seconds.overlapped:.2f} s: {seconds.exposed:.2f} s of communication stay exposed",
            f"a GPU has {gigabytes(device_bytes)} GB; {gigabytes(OUTSIDE)} GB of it are set aside "
            "for what paddle's allocator does not count",
        ]
    )


def _volumes(found: Prediction) -> list[tuple[str, float]]:
    return sorted(found.communication().items(), key=lambda item: -item[1])


def _stages(found: Prediction) -> str:
    names = list(found.stages[0].parts())
    names.sort()
    rows = [
        (
            str(index),
            gigabytes(memory.total),
            *(gigabytes(getattr(memory, name)) for name in names),
            memory.moment,
        )
        for index, memory in enumerate(found.stages)
    ]
    return _table(("stage", "GB", *names, "at"), rows)


def proposals(found: list[Prediction], hardware: Hardware) -> str:
    """Return a table of layouts, in the order given."""
    rows = [
        (
            one.layout.describe(),
            f"{one.work.micro_batch} x {one.work.accumulation}",
            one.work.recompute,
            gigabytes(one.bytes_per_rank),
            f"{one.bubble:.1%}",
            f"{one.seconds.total:.2f}" if one.seconds else "",
            f"{one.tokens_per_second:,.0f}",
            f"{utilization(one, hardware):.0%}",
        )
        for one in found
    ]
    return _table(_HEADINGS, rows)


def flags(found: Prediction) -> str:
    """Return the flags that make a run of this prediction."""
    layout, work = found.layout, found.work
    named: dict[str, object] = {
        "tensor_parallel_degree": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_parallel_degree": layout.pipeline,
        "virtual_pp_degree": layout.virtual_pipeline,
        "context_parallel_degree": layout.context,
        "data_parallel_degree": layout.data,
        "per_device_train_batch_size": work.micro_batch,
        "gradient_accumulation_steps": work.accumulation,
        "recompute": work.recompute != "none",
    }
    if layout.sharding > 1:
        named["sharding"] = f"stage{layout.sharding_stage}"
        named["sharding_parallel_degree"] = layout.sharding
    if work.overlap:
        named["overlap_communication"] = True
    if work.recompute != "none":
        named["recompute_granularity"] = work.recompute
    words = [f"--{name} {str(value).lower()}" for name, value in named.items()]
    return " ".join(words)
