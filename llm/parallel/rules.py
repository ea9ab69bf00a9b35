"""Which layouts are possible: from flags, the number of processes and the shape of a network.

Then how the stages of a pipeline talk, which flags say too. Everything here is decided before
paddle is imported. A refusal names the value, the rule and the nearest value that fits.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError, near_name
from llm.parallel.layout import Layout, divisors, nearest

_STAGES = {"stage1": 1, "stage2": 2, "stage3": 3}
_LAUNCH = "python -m paddle.distributed.launch --nproc_per_node {0} (--gpus with {0} entries)"


def launched() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def sharding_stage(words: str) -> int:
    """Return the stage that ``--sharding`` names; 0 for none.

    Raises:
        UserError: a word that is none of stage1, stage2, stage3 and offload, or two stages.
    """
    stages = [word for word in words.split() if word != "offload"]
    unknown = [word for word in stages if word not in _STAGES]
    if unknown:
        raise UserError(
            f"sharding={words!r}: {unknown[0]!r} is not one of stage1, stage2, stage3, offload"
        )
    if len(stages) > 1:
        raise UserError(f"sharding={words!r} names {len(stages)} stages; keep one")
    if words and not stages:
        raise UserError(f"sharding={words!r} names no stage; add stage1, stage2 or stage3")
    return _STAGES[stages[0]] if stages else 0


def resolve(flags: Any, world: int) -> Layout:
    """Return the layout that flags ask for over a number of processes.

    Args:
        flags: an object with the fields of ``llm.config.parallel.ParallelArguments``.
        world: processes.

    Raises:
        UserError: degrees that do not multiply to the processes, or exclude each other.
    """
    tensor, pipeline = max(flags.tensor_parallel_degree, 1), max(flags.pipeline_parallel_degree, 1)
    context, kind = _context(flags)
    for name in ("sharding_parallel_degree", "data_parallel_degree"):
        if getattr(flags, name) == 0:
            raise UserError(f"{name}=0: give a positive number, or -1 for what remains")
    model = tensor * pipeline * context
    if world % model:
        split = "sep" if flags.sep_parallel_degree > 1 else "context"
        _refuse_product(world, tensor, pipeline, context, f"{split}_parallel_degree")
    stage = sharding_stage(flags.sharding)
    data, sharding = _replicas(flags, world, world // model, stage)
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=flags.virtual_pp_degree,
        data=data,
        sharding=sharding,
        sharding_stage=stage if sharding > 1 else 0,
        context=context,
        context_kind=kind,
        sequence_parallel=flags.sequence_parallel and tensor > 1,
    )
    check_chunks(layout)
    return layout


def _context(flags: Any) -> tuple[int, str]:
    context, sep = max(flags.context_parallel_degree, 1), max(flags.sep_parallel_degree, 1)
    if context > 1 and sep > 1:
        raise UserError(
            f"context_parallel_degree={context} and sep_parallel_degree={sep} both split the "
            "sequence; keep one"
        )
    return (sep, "ulysses") if sep > 1 else (context, flags.context_parallel_kind)


def _refuse_product(world: int, tensor: int, pipeline: int, context: int, flag: str) -> None:
    model = tensor * pipeline * context
    degrees = (
        f"tensor_parallel_degree={tensor} x pipeline_parallel_degree={pipeline} x "
        f"{flag}={context} takes a multiple of {model} processes"
    )
    if world < model:
        raise UserError(
            f"{degrees}, launched: {world}; start {model} with {_LAUNCH.format(model)}, or lower "
            "the degrees"
        )
    name, wanted, rest = max(
        ("tensor_parallel_degree", tensor, model // tensor),
        ("pipeline_parallel_degree", pipeline, model // pipeline),
        (flag, context, model // context),
        key=lambda axis: axis[1] if world % axis[2] == 0 else 0,
    )
    fitting = divisors(world // rest) if world % rest == 0 else []
    fix = f"set {name}={nearest(wanted, fitting)}" if fitting else "set two of them to 1"
    below = world - world % model
    raise UserError(f"{degrees}, launched: {world}; {fix}, or start {below} or {below + model}")


def _replicas(flags: Any, world: int, rest: int, stage: int) -> tuple[int, int]:
    """Return data and sharding degree: what is not given is what remains."""
    data, sharding = flags.data_parallel_degree, flags.sharding_parallel_degree
    if sharding > 1 and not stage:
        raise UserError(
            f"sharding_parallel_degree={sharding} without sharding: add --sharding stage1 (or "
            "stage2, stage3), or use data_parallel_degree"
        )
    if not stage:
        sharding = 1
    elif sharding < 0:
        sharding = rest // data if data > 0 and rest % data == 0 else rest
    if data < 0 and rest % sharding == 0:
        data = rest // sharding
    if data * sharding != rest:
        kept = nearest(max(sharding, 1), divisors(rest))
        names = ("data_parallel_degree", "sharding_parallel_degree")
        given = [f"{name}={getattr(flags, name)}" for name in names if getattr(flags, name) > 0]
        fitting = f"data_parallel_degree={rest // kept}"
        if stage:
            fitting += f" and sharding_parallel_degree={kept}"
        raise UserError(
            f"{' and '.join(given)} does not make up the {rest} replicas of the model that {world} "
            f"processes hold; the nearest that does: {fitting}"
        )
    return data, sharding


def check_chunks(layout: Layout) -> None:
    """Refuse chunks where the same two stages are each other's next and previous one.

    Raises:
        UserError: with what to do.
    """
    if layout.virtual_pipeline > 1 and layout.pipeline < 3:
        raise UserError(
            f"virtual_pp_degree={layout.virtual_pipeline} needs 3 stages or more, there are "
            f"{layout.pipeline}: between two, fleet's interleaved schedule could confuse hidden "
            "states with gradients, so it needs pipeline_parallel_degree of 3 or more; set "
            "virtual_pp_degree=1 or more stages"
        )


def check_shape(layout: Layout, config: Any, *, seq_length: int, micro_batches: int) -> None:
    """Refuse a layout that a network, or its batches, cannot be cut into.

    Args:
        layout: the degrees.
        config: with the fields of ``LlamaConfig`` that say sizes.
        seq_length: longest row of a batch.
        micro_batches: batches of an update that a pipeline runs (gradient_accumulation_steps).

    Raises:
        UserError: names the flag, the size that does not divide, and a degree that fits.
    """
    _check_tensor(layout, config)
    _check_pipeline(layout, config, micro_batches)
    _check_sequence(layout, config, seq_length)


def _fitting(name: str, degree: int, size: Callable[[int], bool]) -> str:
    return f"{name}={nearest(degree, [d for d in range(1, degree) if size(d)])} fits"


def _check_tensor(layout: Layout, config: Any) -> None:
    degree = layout.tensor
    sizes = {
        name: getattr(config, name)
        for name in (
            "num_key_value_heads",
            "intermediate_size",
            "vocab_size",
        )
    }
    for name, size in sizes.items():
        if size % degree:
            fix = _fitting(
                "tensor_parallel_degree", degree, lambda d: not any(s % d for s in sizes.values())
            )
            raise UserError(
                f"tensor_parallel_degree={degree} does not divide the model's {name}={size}; {fix}"
            )


def _check_pipeline(layout: Layout, config: Any, micro_batches: int) -> None:
    layers, stages, chunks = config.num_hidden_layers, layout.pipeline, layout.virtual_pipeline
    if stages > layers:
        raise UserError(
            f"pipeline_parallel_degree={stages} exceeds the model's num_hidden_layers={layers}; "
            + _fitting("pipeline_parallel_degree", stages, lambda d: d <= layers)
        )
    if chunks == 1:
        return
    if layers % (stages * chunks):
        fix = _fitting("virtual_pp_degree", chunks, lambda d: d == 1 or layers % (stages * d) == 0)
        raise UserError(
            f"virtual_pp_degree={chunks} x pipeline_parallel_degree={stages} does not divide the "
            f"model's num_hidden_layers={layers}; {fix}"
        )
    if micro_batches < stages:
        raise UserError(
            f"virtual_pp_degree={chunks} keeps {stages} stages busy with as many micro-batches in "
            f"an update or more, not gradient_accumulation_steps={micro_batches}; "
            f"gradient_accumulation_steps={stages} fits"
        )


def sequence_unit(layout: Layout) -> int:
    """Return what the length of every row has to be a multiple of."""
    tensor = layout.tensor if layout.sequence_parallel else 1
    # A ring gives every rank an early and a late part, so that causal work is balanced.
    ring = 2 if layout.context > 1 and layout.context_kind == "ring" else 1
    return layout.context * ring * tensor


def _check_sequence(layout: Layout, config: Any, seq_length: int) -> None:
    unit = sequence_unit(layout)
    if seq_length % unit:
        raise UserError(
            f"sequences of {seq_length} tokens cannot be cut evenly: {layout.describe()} takes a "
            f"multiple of {unit}; a length of {max(1, round(seq_length / unit)) * unit} fits"
        )
    if layout.context > 1 and config.rope_scaling.rope_type == "dynamic":
        raise UserError(
            f"context_parallel_degree={layout.context}: dynamic rotary scaling depends on the "
            "length of the whole row, which no process sees; set it to 1"
        )
    if layout.context > 1 and layout.context_kind == "ulysses":
        _check_ulysses(layout, config)


def _check_ulysses(layout: Layout, config: Any) -> None:
    """Key/value heads that are fewer than the ranks are repeated."""
    heads = config.num_attention_heads // layout.tensor
    groups = config.num_key_value_heads // layout.tensor

    def fits(ranks: int) -> bool:
        return heads % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0)

    if not fits(layout.context):
        raise UserError(
            f"ulysses gives every rank whole heads: {layout.context} ranks do not divide "
            f"num_attention_heads={heads} of a tensor parallel rank, or neither divide nor are a "
            f"multiple of its num_key_value_heads={groups}; "
            f"{_fitting('sep_parallel_degree', layout.context, fits)}, or use "
            "--context_parallel_kind ring"
        )


# Words that are right, and why there is nothing to do.
_NEEDLESS = {
    "disable_p2p_cache_shape": "rows of any length may follow each other anyway",
    "enable_clear_every_step_cache": "shapes are announced anew whenever they change",
    "enable_delay_scale_loss": "losses are sums, divided by the labels of the whole update",
    "enable_dp_comm_overlap": "--overlap_communication does that, in every layout",
    "enable_sharding_comm_overlap": "--overlap_communication does that, in every layout",
    "enable_release_grads": "gradients are released after every update anyway",
    "enable_timer": "the trainer reports the time of a step",
}
_FIELDS = {
    "disable_partial_send_recv": ("partial_send", False),
    "enable_overlap_p2p_comm": ("overlap", True),
    "disable_batch_p2p_comm": ("batched", False),
    "best_unbalanced_scheduler": ("unbalanced", True),
}
_REFUSED = {"use_dualpipev": "it is not supported; use --virtual_pp_degree for a smaller bubble"}


@dataclass(frozen=True)
class PipelineOptions:
    """How stages talk to each other.

    Args:
        partial_send: each tensor parallel rank sends its share of the hidden states, which the
            receivers then gather; never done under sequence parallel, where they hold other rows.
        batched: send and receive in one grouped call.
        overlap: transfers of an interleaved schedule run beside computation.
        unbalanced: fleet's interleaved order for micro-batches that are no multiple of the stages.
    """

    partial_send: bool = True
    batched: bool = True
    overlap: bool = False
    unbalanced: bool = False


def parse_options(words: str) -> tuple[PipelineOptions, list[str]]:
    """Read ``--pipeline_parallel_config``.

    Args:
        words: separated by spaces or commas.

    Returns:
        the options, and for each word without effect a message that says why.

    Raises:
        UserError: a word that PaddleNLP does not know either, with the nearest one, or one that is
            not supported.
    """
    fields, messages = {}, []
    for word in filter(None, re.split(r"[\s,]+", words)):
        if word in _FIELDS:
            name, value = _FIELDS[word]
            fields[name] = value
        elif word in _NEEDLESS:
            messages.append(f"pipeline_parallel_config: {word} changes nothing: {_NEEDLESS[word]}")
        elif word in _REFUSED:
            raise UserError(f"pipeline_parallel_config={word!r}: {_REFUSED[word]}")
        else:
            _refuse_unknown(word)
    return PipelineOptions(**fields), messages


def _refuse_unknown(word: str) -> None:
    known = sorted([*_FIELDS, *_NEEDLESS])
    close = near_name(word, known)
    fix = f"did you mean {close!r}?" if close else f"known are {', '.join(known)}"
    raise UserError(f"pipeline_parallel_config={word!r} is unknown; {fix}")


def check_micro_batches(layout: Layout, count: int, options: PipelineOptions) -> None:
    """Refuse updates of too few micro-batches for an interleaved schedule.

    Raises:
        UserError: with the number that is needed.
    """
    if layout.virtual_pipeline == 1:
        return
    needed = layout.pipeline * (2 if options.unbalanced else 1)
    if count < needed:
        kind = "best_unbalanced_scheduler" if options.unbalanced else "interleaved"
        raise UserError(
            f"the {kind} schedule of {layout.pipeline} stages needs {needed} micro-batches or more "
            f"in an update, not {count}; set gradient_accumulation_steps={needed}"
        )


def check_frozen(layout: Layout) -> None:
    """Refuse layouts that take apart matrices which do not train and lie in bfloat16.

    Raises:
        UserError: names the degrees.
    """
    if layout.tensor > 1 or layout.sharding_stage == 3:
        raise UserError(
            "base_dtype=bfloat16 keeps whole frozen matrices in every process, and "
            f"{layout.describe()} splits them; leave it out, or use data or pipeline parallelism, "
            "and sharding up to stage 2"
        )
