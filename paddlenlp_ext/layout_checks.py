"""What a run's layout takes: refused when impossible, predicted when not."""

from typing import Any

from llm.config.training import TrainArguments
from llm.errors import UserError
from llm.parallel.layout import Layout
from llm.parallel.pipeline_options import check_micro_batches, parse_options
from llm.parallel.rules import check_shape


def check_layout(run: TrainArguments, config: Any, seq_length: int) -> list[str]:
    """Refuse a layout that the network or its batches cannot be cut into.

    Args:
        run: the flags.
        config: the architecture.
        seq_length: tokens of a row.

    Returns:
        What the user should read before the run starts.

    Raises:
        UserError: names the flag, the rule and the nearest value that fits.
    """
    layout = run.layout
    batches = run.gradient_accumulation_steps
    check_shape(layout, config, seq_length=seq_length, micro_batches=batches)
    options, messages = parse_options(run.pipeline_parallel_config)
    check_micro_batches(layout, batches, options)
    layers = config.num_hidden_layers
    if run.recompute_num_layers is not None and run.recompute_num_layers > layers:
        raise UserError(
            f"recompute_num_layers={run.recompute_num_layers} exceeds the model's {layers} layers; "
            "leave it out to recompute all"
        )
    if run.sequence_parallel and layout.tensor == 1:
        messages.append("sequence_parallel is not used: tensor_parallel_degree is 1")
    if run.sharding and layout.sharding == 1:
        messages.append(f"sharding={run.sharding} is not used: there is one process to shard over")
    if layout.world_size > 1:
        messages.append(
            f"layout: {layout.describe()}, {layout.data_ranks} x {run.per_device_train_batch_size} "
            f"samples in each of {batches} micro-batches"
        )
    if layout.pipeline > 1:
        messages.append(
            f"pipeline: stages wait {layout.bubble(batches):.0%} of the time; more "
            "gradient_accumulation_steps or virtual_pp_degree lower that"
        )
    return messages


def bytes_per_process(layout: Layout, weights: int, trained: int) -> float:
    """Return what float32 weights, gradients and moments take in each process.

    Args:
        layout: the degrees.
        weights: parameters of the network.
        trained: those that have gradients and moments.
    """
    model = layout.tensor * layout.pipeline
    held = [layout.sharding if layout.sharding_stage >= stage else 1 for stage in (3, 2, 1)]
    return (4 * weights / held[0] + 4 * trained / held[1] + 8 * trained / held[2]) / model
