"""What the server needs of a model: an engine, its tokenizer, and a name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.errors import UserError
from data.tokenization.stream import StreamDecoder
from data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_place
from llm import runtime
from llm.config.evaluation import EvaluatedModelArguments
from llm.config.generation import ProgramArguments
from llm.engine.sequence import SamplingParams, Step
from llm.llama.config import load_config
from llm.llama.files import peft
from llm.llama.manifest import load_manifest

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

    def decoder(self, context: Sequence[int] = ()) -> StreamDecoder:
        """Return a detokeniser for an answer that continues the ids of ``context``."""
        decoder = _PaddedVocabularyDecoder(self.tokenizer.stream(), self.tokenizer.vocab_size)
        for token_id in context[-_CONTEXT_TOKENS:]:
            decoder.push(token_id)
        return decoder


@dataclass(frozen=True)
class _PaddedVocabularyDecoder:
    """A model whose vocabulary is padded may sample an id that stands for no text."""

    decoder: StreamDecoder
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


def open_tokenizer(args: EvaluatedModelArguments, max_length: int | None = None) -> Tokenizer:
    """Return the model's tokenizer, after checking that the two belong together.

    Args:
        args: which model.
        max_length: context that scoring is going to use.

    Raises:
        UserError: no model or adapter, a damaged export, a tokenizer of another model, or a context
            beyond the model's.
        DataError: no tokenizer, or a damaged one.
    """
    if args.model_dir is not None:
        manifest = load_manifest(args.model_dir, args.model_prefix)
        checked_length(max_length, manifest.max_model_len)
        tokenizer = load_tokenizer(
            args.tokenizer_name_or_path or args.model_dir, chat_template=args.chat_template
        )
        manifest.check_tokenizer(tokenizer.name, tokenizer.fingerprint)
        return tokenizer
    if args.model_name_or_path is None:
        raise UserError(
            "a model is needed: --model_name_or_path DIR, or --model_dir DIR of an exported program"
        )
    config = load_config(args.model_name_or_path)
    checked_length(max_length, config.max_position_embeddings)
    if args.path is not None:
        peft.read_config(args.path, args.kind)
    place = tokenizer_place(args.tokenizer_name_or_path, args.path, args.model_name_or_path)
    tokenizer = load_tokenizer(place, chat_template=args.chat_template)
    check_vocabulary(tokenizer, config.vocab_size)
    return tokenizer


def checked_length(max_length: int | None, trained: int) -> int:
    """Return the context to use.

    Raises:
        UserError: less than one token, or more than the model was made for.
    """
    if max_length is None:
        return trained
    if not 1 <= max_length <= trained:
        raise UserError(
            f"max_length={max_length} has to be between 1 and the model's context of {trained}"
        )
    return max_length
