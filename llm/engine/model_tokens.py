"""What the tokens of a model mean: as text, as ends of answers, in grammars.

An opened model knows that, and so does whoever talks to one in another process.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from data.tokenization.stream import StreamDecoder
from data.tokenizer import Tokenizer

if TYPE_CHECKING:  # answers without a grammar do not load llguidance
    from llm.engine.grammar import Grammars

# Tokens of the prompt that the detokeniser sees before the answer: they decide about a leading
# space, and a prompt may end inside a character of up to four byte tokens.
_CONTEXT_TOKENS = 8


class ModelTokens:
    """A model's vocabulary beside its tokenizer's.

    Subclasses have ``tokenizer``, ``num_logits`` (ids that the network has logits for) and
    ``end_ids`` (tokens that end an answer, by the tokenizer or by the model's files).
    """

    tokenizer: Tokenizer

    @property
    def num_logits(self) -> int:
        raise NotImplementedError

    @property
    def end_ids(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Ids that both model and tokenizer know; models may pad their vocabulary."""
        return min(self.num_logits, self.tokenizer.vocab_size)

    @cached_property
    def grammars(self) -> "Grammars":
        """Compiles what answers of this model have to obey.

        Raises:
            UserError: no token ends an answer, or one of the tokenizer has no bytes of its own.
        """
        from llm.engine.grammar import Grammars

        return Grammars(self.tokenizer, self.num_logits, self.end_ids)

    def decoder(self, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """Return a detokeniser for an answer.

        Args:
            prompt_ids: what the answer's text continues; nothing where it is a turn of its own.
        """
        decoder = _KnownIds(self.tokenizer.stream(), self.tokenizer.vocab_size)
        for token_id in prompt_ids[-_CONTEXT_TOKENS:]:
            decoder.push(token_id)
        decoder.settle()
        return decoder

    def text(self, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> str:
        """Return the text of an answer's ids, without control tokens; see :meth:`decoder`."""
        decoder = self.decoder(prompt_ids)
        return "".join(map(decoder.push, ids)) + decoder.finish()


class _KnownIds(StreamDecoder):
    """A model whose vocabulary is padded may sample an id that stands for no text."""

    def __init__(self, decoder: StreamDecoder, vocab_size: int) -> None:
        self._decoder, self._vocab_size = decoder, vocab_size

    def push(self, token_id: int) -> str:
        return self._decoder.push(token_id) if token_id < self._vocab_size else ""

    def settle(self) -> None:
        self._decoder.settle()

    def finish(self) -> str:
        return self._decoder.finish()
