"""Tokenizers of Llama 1 to 3.2 behind one interface; nothing here touches the network.

tokenizer = load_tokenizer("models/llama-2-7b")
ids = tokenizer.encode("Hello", add_bos=True)
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from common.errors import DataError
from common.gguf import gguf_file, read_gguf
from data.tokenization.added_tokens import SpecialTokens
from data.tokenization.base import Tokenizer
from data.tokenization.chat import BUILT_IN, Message
from data.tokenization.gguf_vocabulary import read_vocabulary
from data.tokenization.hf_json import HFTokenizer
from data.tokenization.model_files import DEFAULT, Declared, read_declared
from data.tokenization.sentencepiece_model import SentencePieceTokenizer
from data.tokenization.stream import StreamDecoder
from data.tokenization.tiktoken_file import TiktokenTokenizer
from data.vocabulary import check_vocabulary

__all__ = [
    "HFTokenizer",
    "Message",
    "SentencePieceTokenizer",
    "SpecialTokens",
    "StreamDecoder",
    "TiktokenTokenizer",
    "Tokenizer",
    "check_vocabulary",
    "load_tokenizer",
]

# Tokenizers that ship with the suite, under the names that the model presets have.
BUILT_IN_TOKENIZERS = {
    "__internal_testing__/tiny-random-llama": Path(__file__).parent / "assets/tiny-random-llama",
}

# In the order of preference; paddlenlp calls the sentencepiece file by the third name.
VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json", "sentencepiece.bpe.model")


def load_tokenizer(
    path: str | Path, *, chat_template: str | None = None, add_bos_token: bool | None = None
) -> Tokenizer:
    """The tokenizer of a model directory, or of a single vocabulary file.

    A directory's own files name the control tokens, the ids that end a generation and the chat
    template. What kind a file is, is told from its content: both Llama 2 and Llama 3 call
    theirs tokenizer.model.

    Args:
        path: a directory with tokenizer.model or tokenizer.json, such a file, a GGUF file, a
            directory that holds one, or a name of :data:`BUILT_IN_TOKENIZERS`.
        chat_template: the name of one of the directory's templates; "llama2", "llama3", "simple",
            "alpaca", "vicuna", "chatml" or "plain" for a built-in one; a path to a Jinja file, or
            Jinja source. It takes the place of the directory's own.
        add_bos_token: whether texts that stand alone begin with BOS, in place of what
            tokenizer_config.json says; what templates write stays.

    Raises:
        DataError: nothing there, a damaged file, files that do not belong together, or a BOS that
            is asked for and not there.
    """
    place = BUILT_IN_TOKENIZERS.get(str(path), Path(path))
    if not has_vocabulary(place) and (model := gguf_file(place)) is not None:
        file = model
        content, declared = read_vocabulary(read_gguf(file))
    elif place.is_dir():
        file = _vocabulary_in(place)
        content, declared = file.read_bytes(), read_declared(place, file.name)
    elif place.is_file():
        file, content, declared = place, place.read_bytes(), Declared()
    else:
        raise DataError(
            f"no tokenizer at {place}: it must be a local directory with one of "
            f"{', '.join(VOCABULARY_FILES)}, such a file, or a GGUF file (nothing is downloaded)"
        )
    templates = declared.templates
    if chat_template is not None:
        templates = {DEFAULT: _template(chat_template, templates)}
    if add_bos_token is not None:
        config = {**declared.config, "add_bos_token": add_bos_token}
        declared = replace(declared, config=config)
    tokenizer = _kind(file, content)(file, content, declared, templates)
    if add_bos_token and not tokenizer.adds_bos:
        raise DataError(
            f"add_bos_token: {tokenizer.name} has no BOS token; leave the flag out, or name one as "
            "bos_token in its tokenizer_config.json"
        )
    return tokenizer


def tokenizer_place(named: str | None, adapter: str | None, model: str) -> str:
    """Where the tokenizer of a model with an adapter lies.

    What was named comes first; then the adapter's own directory, since the chat template there is
    the one that it was trained with; then the model's.
    """
    if named is not None:
        return named
    if adapter is not None and has_vocabulary(adapter):
        return adapter
    return model


def has_vocabulary(directory: str | Path) -> bool:
    """Whether a directory holds a vocabulary file."""
    return any((Path(directory) / name).is_file() for name in VOCABULARY_FILES)


def _vocabulary_in(directory: Path) -> Path:
    for name in VOCABULARY_FILES:
        if (directory / name).is_file():
            return directory / name
    raise DataError(
        f"{directory} holds no tokenizer: none of {', '.join(VOCABULARY_FILES)} is there"
    )


def _kind(
    file: Path, content: bytes
) -> type[SentencePieceTokenizer] | type[TiktokenTokenizer] | type[HFTokenizer]:
    if not content:
        raise DataError(f"{file} is empty: copy the tokenizer file again")
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if content.lstrip()[:1] == b"{":
        return HFTokenizer
    first_line = content[:200].split(b"\n", 1)[0].split()
    if len(first_line) == 2 and first_line[1].isdigit():
        return TiktokenTokenizer
    # A sentencepiece model begins with the key of its first piece.
    if content[:1] == b"\x0a":
        return SentencePieceTokenizer
    raise DataError(
        f"{file} is no tokenizer file: it begins with {content[:16]!r}, which is neither a "
        "sentencepiece model, a tiktoken file nor a tokenizer.json"
    )


def _template(choice: str, named: Mapping[str, str]) -> str:
    """The source of a template that the directory or this suite names, of a file, or itself."""
    for known in (named, BUILT_IN):
        if choice in known:
            return known[choice]
    if "{" in choice:
        return choice
    if Path(choice).is_file():
        return Path(choice).read_text(encoding="utf-8")
    names = ", ".join(dict.fromkeys([*sorted(named), *BUILT_IN]))
    raise DataError(
        f"unknown chat template {choice!r}: choose {names}, a Jinja file, or Jinja source"
    )
