"""What the server needs of a model: an engine, its tokenizer, and a name."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llm.serving.text import Decoder, StepLike

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


class EngineLike(Protocol):
    """The part of ``llm.engine.Engine`` that serving uses."""

    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]

    def stream(self, prompt_ids: Sequence[int], params: Any) -> Generator[StepLike, None, None]: ...


@dataclass(frozen=True)
class Backend:
    """A loaded model.

    Args:
        engine: generates tokens.
        tokenizer: the one the model was trained with.
        model_id: name that clients give.
        make_params: ``SamplingParams`` of the engine.
    """

    engine: EngineLike
    tokenizer: "Tokenizer"
    model_id: str
    make_params: Callable[..., Any]

    # Tokens of the prompt that the detokeniser sees before the answer: they decide about a leading
    # space, and a prompt may end inside a character of up to four byte tokens.
    CONTEXT_TOKENS = 8

    def decoder(self, prompt_ids: Sequence[int] = ()) -> Decoder:
        """Return a detokeniser for an answer that continues ``prompt_ids``."""
        stream = self.tokenizer.stream()
        for token_id in prompt_ids[-self.CONTEXT_TOKENS :]:
            stream.push(token_id)
        return stream
