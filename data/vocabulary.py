"""Whether a tokenizer, the ids that it made and the model that is to take them belong together."""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Protocol

from common.errors import DataError
from data.tokenization.added_tokens import AddedToken

_log = logging.getLogger(__name__)
SHOWN = 3


class Vocabulary(Protocol):
    """What of a tokenizer is compared."""

    name: str
    vocab_size: int

    @property
    def pad_id(self) -> int | None: ...

    @property
    def added(self) -> Mapping[int, AddedToken]: ...

    def leave_out_pad(self) -> None: ...


def check_vocabulary(tokenizer: Vocabulary, vocab_size: int) -> None:
    """Refuse a tokenizer that can make ids the model has no embedding for.

    One whose pad token alone is beyond the model, as many that were finetuned with LLaMA's code
    have, fits without it: rows are packed or masked here, and no pad token is ever fed.

    Raises:
        DataError: the tokenizer's vocabulary is larger than the model's.
    """
    beyond = tokenizer.vocab_size - vocab_size
    if beyond <= 0:
        return
    if beyond == 1 and tokenizer.pad_id == vocab_size:
        _tell(
            f"the tokenizer {tokenizer.name} has a pad token with id {vocab_size}, the model's "
            f"vocab_size is {vocab_size}: it is left out, since none is ever fed"
        )
        tokenizer.leave_out_pad()
        return
    texts = [
        tokenizer.added[i].content
        for i in range(vocab_size, tokenizer.vocab_size)
        if i in tokenizer.added
    ]
    without = ""
    if len(texts) == beyond:
        more = f" and {beyond - SHOWN} more" if beyond > SHOWN else ""
        without = (
            f", so it has no embedding for {', '.join(map(repr, texts[:SHOWN]))}{more}; make some "
            "with `python convert_checkpoint.py --input_dir MODEL --output_dir NEW --vocab_size "
            f"{tokenizer.vocab_size}` and give NEW, or"
        )
    raise DataError(
        f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's "
        f"vocab_size is {vocab_size}{without or ';'} give the model's own with "
        "--tokenizer_name_or_path"
    )


@cache
def _tell(message: str) -> None:
    """Log once, however often a model is opened."""
    _log.warning(message)


def check_origin(
    made: str,
    fingerprint: str,
    *,
    recorded: str | None,
    recorded_name: str | None,
    name: str | None = None,
    fix: str,
) -> None:
    """Refuse a tokenizer other than the one that something was made with.

    Args:
        made: what was made, for the message: "data/corpus was made".
        fingerprint, name: of the tokenizer given.
        recorded, recorded_name: fingerprint and name of the one it was made with; without a
            fingerprint nothing is known, and nothing refused.
        fix: what to do besides using that one.

    Raises:
        DataError: the fingerprints differ.
    """
    if recorded is not None and recorded != fingerprint:
        than = f" than {name}" if name else ""
        raise DataError(
            f"{made} with another tokenizer ({recorded_name}){than}: use that one, or {fix}"
        )
