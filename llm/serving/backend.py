"""What the server needs of a model: an engine, its tokenizer, and a name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llm import runtime
from llm.config.schema import ProgramArguments
from llm.engine.manifest import load_manifest
from llm.engine.sequence import SamplingParams, Step
from llm.serving.text import Decoder

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

# Tokens of the prompt that the detokeniser sees before the answer: they decide about a leading
# space, and a prompt may end inside a character of up to four byte tokens.
_CONTEXT_TOKENS = 8


class EngineLike(Protocol):
    """The part of :class:`llm.engine.engine.Engine` that serving uses."""

    max_model_len: int
    vocab_size: int

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Step]: ...


@dataclass(frozen=True)
class Backend:
    """A loaded model.

    Args:
        engine: generates tokens.
        tokenizer: the one the model was trained with.
        model_id: name that clients give.
    """

    engine: EngineLike
    tokenizer: "Tokenizer"
    model_id: str

    @property
    def vocab_size(self) -> int:
        """Ids that both model and tokenizer know; models may pad their vocabulary."""
        return min(self.engine.vocab_size, self.tokenizer.vocab_size)

    def decoder(self, context: Sequence[int] = ()) -> Decoder:
        """Return a detokeniser for an answer that continues the ids of ``context``."""
        decoder = _PaddedVocabularyDecoder(self.tokenizer.stream(), self.tokenizer.vocab_size)
        for token_id in context[-_CONTEXT_TOKENS:]:
            decoder.push(token_id)
        return decoder


@dataclass(frozen=True)
class _PaddedVocabularyDecoder:
    """A model whose vocabulary is padded may sample an id that stands for no text."""

    decoder: Decoder
    vocab_size: int

    def push(self, token_id: int) -> str:
        return self.decoder.push(token_id) if token_id < self.vocab_size else ""

    def finish(self) -> str:
        return self.decoder.finish()


def load_backend(
    program: ProgramArguments,
    *,
    threads: int,
    max_tokens: int,
    model_id: str | None = None,
    chat_template: str | None = None,
) -> Backend:
    """Open an exported program and the tokenizer beside it, and run it once.

    Args:
        program: which one.
        threads: CPU threads.
        max_tokens: prompt plus answer of the longest request that will come.
        model_id: name in ``/v1/models``; the manifest's when not given.
        chat_template: takes the place of the model's own, see ``load_tokenizer``.

    Raises:
        UserError: a missing or damaged export, or a tokenizer that is not the exported model's.
        DataError: no tokenizer beside the program, or a damaged one.
    """
    from data.tokenizer import load_tokenizer
    from llm.engine import load_engine

    manifest = load_manifest(program.model_dir, program.model_prefix)
    tokenizer = load_tokenizer(
        program.tokenizer_name_or_path or program.model_dir, chat_template=chat_template
    )
    manifest.check_tokenizer(tokenizer.name, tokenizer.fingerprint)
    runtime.load_paddle(program.device)
    engine = load_engine(
        program.model_dir,
        program.model_prefix,
        device=program.device,
        threads=threads,
        max_sequences=1,
        max_tokens=min(max_tokens, manifest.max_model_len),
        num_blocks=program.cache_blocks,
    )
    # The first run is slow (kernels are chosen, memory is taken); users should not wait for it.
    for _ in engine.stream([0], SamplingParams(max_new_tokens=2, temperature=0, ignore_eos=True)):
        pass
    return Backend(engine, tokenizer, model_id or manifest.model_name)
