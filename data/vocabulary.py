"""Whether a tokenizer, the ids that it made and the model that is to take them belong together."""

from typing import Protocol

from common.errors import DataError


class Vocabulary(Protocol):
    """What of a tokenizer is compared."""

    name: str
    vocab_size: int


def check_vocabulary(tokenizer: Vocabulary, vocab_size: int) -> None:
    """Refuse a tokenizer that can make ids the model has no embedding for.

    Raises:
        DataError: the tokenizer's vocabulary is larger than the model's.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's "
            f"vocab_size is {vocab_size}; give the model's own with --tokenizer_name_or_path"
        )


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
