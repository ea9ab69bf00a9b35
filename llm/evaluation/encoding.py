"""Text to the ids that are scored, split as lm-evaluation-harness splits them."""

from common.errors import UserError
from data.tokenizer import Tokenizer


def _encode(tokenizer: Tokenizer, text: str, add_bos: bool | None) -> list[int]:
    wanted = tokenizer.adds_bos if add_bos is None else add_bos
    return tokenizer.encode(text, add_bos=wanted)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, add_bos: bool | None = None
) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of what follows it.

    Both are encoded together and split at the length of the context alone; blanks at the context's
    end go to the continuation, whose first token usually holds them (``TemplateLM._encode_pair``).

    Args:
        tokenizer: of the model.
        context: what comes before.
        continuation: what is to be scored. In both, spelled control tokens stay characters.
        add_bos: whether a BOS token comes first; None is what the tokenizer says.

    Raises:
        UserError: nothing left to predict the continuation from.
    """
    kept = context.rstrip()
    whole = _encode(tokenizer, context + continuation, add_bos)
    before = _encode(tokenizer, kept, add_bos) if kept else []
    if not before:
        prefix = prefix_id(tokenizer)
        ids = tokenizer.encode(context + continuation)
        return [prefix], ids
    return before, whole[len(before) :]


def prefix_id(tokenizer: Tokenizer) -> int:
    """Return the token that the first token of a text is predicted from: BOS, or else EOS.

    Raises:
        UserError: the tokenizer has neither.
    """
    for token_id in (tokenizer.bos_id, *tokenizer.eos_ids):
        if token_id is not None:
            return token_id
    raise UserError(
        f"{tokenizer.name} has neither a BOS nor an EOS token to predict a first token from; add "
        "bos_token to its tokenizer_config.json"
    )
