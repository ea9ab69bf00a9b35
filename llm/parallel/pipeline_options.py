"""The words of ``--pipeline_parallel_config``, which are PaddleNLP's, and what schedules need."""

import difflib
import re
from dataclasses import dataclass

from llm.errors import UserError
from llm.parallel.layout import Layout

# Words that are right, and why there is nothing to do.
_NEEDLESS = {
    "disable_p2p_cache_shape": "rows of any length may follow each other anyway",
    "enable_clear_every_step_cache": "shapes are announced anew whenever they change",
    "enable_delay_scale_loss": "losses are sums, divided by the labels of the whole update",
    "enable_dp_comm_overlap": "gradients are summed once, after the last micro-batch",
    "enable_sharding_comm_overlap": "gradients are summed once, after the last micro-batch",
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
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    fix = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    raise UserError(f"pipeline_parallel_config={word!r} is unknown; {fix}")


def check_chunks(layout: Layout) -> None:
    """Refuse chunks where the same two stages are each other's next and previous one.

    Raises:
        UserError: with what to do.
    """
    if layout.virtual_pipeline > 1 and layout.pipeline < 3:
        raise UserError(
            f"virtual_pp_degree={layout.virtual_pipeline} needs 3 stages or more, there are "
            f"{layout.pipeline}: between two, hidden states and gradients could be confused; set "
            "virtual_pp_degree=1"
        )


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
