"""What every tokenizer can do, whatever file it was read from."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from common.errors import DataError
from common.files import write_whole
from data.tokenization.chat import BUILT_IN, Message, render, seal, special_pattern, unseal
from data.tokenization.packed import PackedEncoder, PlainEncoder
from data.tokenization.stream import StreamDecoder, WindowStreamDecoder


@dataclass(frozen=True)
class SpecialTokens:
    """Control tokens of a tokenizer: they never come out of raw text, only out of templates.

    `ids` maps each control token's text to its id. `eos_ids` lists every id that ends a
    generation; the first of them is the one that ends a document in pretraining data.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        name: the kind and the file's name, for messages.
        vocab_size: number of ids; every id is below it.
        special: the control tokens.
        fingerprint: sha256 (hex) of the vocabulary file. Two tokenizers with the same
            fingerprint give the same ids for the same text.
        chat_template: Jinja source, or None where the model has none.
    """

    name: str
    vocab_size: int
    special: SpecialTokens
    fingerprint: str
    chat_template: str | None

    def __init__(
        self,
        *,
        name: str,
        vocab_size: int,
        special: SpecialTokens,
        content: bytes,
        chat_template: str | None,
        source: Path,
    ) -> None:
        for text, token_id in special.ids.items():
            if not 0 <= token_id < vocab_size:
                raise DataError(
                    f"{source}: control token {text!r} has id {token_id}, but the vocabulary has "
                    f"ids 0 to {vocab_size - 1}: the tokenizer files do not belong together"
                )
        self.name = name
        self.vocab_size = vocab_size
        self.special = special
        self.chat_template = chat_template
        self.source = source
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @property
    def bos_id(self) -> int | None:
        """Id that begins a sequence, or None."""
        return self.special.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation."""
        return self.special.eos_ids

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document, or None."""
        return self.special.eos_ids[0] if self.special.eos_ids else None

    @property
    def pad_id(self) -> int | None:
        """Id for padding, or None."""
        return self.special.pad_id

    @cached_property
    def special_text(self) -> dict[int, str]:
        """Control token texts by id."""
        return {token_id: text for text, token_id in self.special.ids.items()}

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Finds the control tokens' texts; None where there are none."""
        return special_pattern(self.special.ids)

    # Encoding

    @abstractmethod
    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, in which nothing is a control token. `text` is valid Unicode."""

    @abstractmethod
    def encode_plain_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """`encode_plain` of each text, by the library's own batch call."""

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        allow_special: bool = False,
    ) -> list[int]:
        """Ids of `text`.

        With `allow_special` the texts of control tokens in `text` become control tokens;
        without it they are ordinary characters, so that users' text cannot forge them.

        Raises:
            DataError: `text` is not a str, holds a lone surrogate, or a BOS or EOS is asked
                for that the tokenizer does not have.
        """
        check_text(text)
        ids = self._encode_with_special(text) if allow_special else self.encode_plain(text)
        before, after = self.affixes(add_bos=add_bos, add_eos=add_eos)
        return [*before, *ids, *after]

    def _encode_with_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece, token_id in split_special(text, self.special_pattern, self.special.ids):
            ids.extend(self.encode_plain(piece) if token_id is None else (token_id,))
        return ids

    def affixes(self, *, add_bos: bool, add_eos: bool) -> tuple[list[int], list[int]]:
        """Ids to put before and after each text; `DataError` where one does not exist."""
        if add_bos and self.bos_id is None:
            raise DataError(f"{self.name} has no BOS token, so none can be added")
        if add_eos and self.eos_id is None:
            raise DataError(f"{self.name} has no EOS token, so none can be added")
        before = [self.bos_id] if add_bos and self.bos_id is not None else []
        after = [self.eos_id] if add_eos and self.eos_id is not None else []
        return before, after

    def packed_encoder(self, dtype: DTypeLike) -> PackedEncoder:
        """An encoder of many texts to arrays of `dtype` in bytes: the fast way in bulk."""
        return PlainEncoder(self.encode_plain_batch, np.dtype(dtype))

    @cached_property
    def adds_space(self) -> bool:
        """Whether a text's first word is encoded as if a space stood before it."""
        return False

    @cached_property
    def _newline(self) -> list[int]:
        return self.encode_plain("\n")

    def continuation(self, text: str, before: str) -> tuple[str, list[int]]:
        """How to encode `text` where it goes on from `before` instead of standing alone.

        Returns what to encode and the ids that are then to be left out at its beginning. A
        tokenizer that puts a space before any text would put it inside the line: "[/INST] Yes"
        would get two, "Assistant:\\nYes" one that is not there. Where neither side has white
        space the added space stays and separates them, as it does in PaddleNLP's {src, tgt}.
        """
        if not self.adds_space or not text:
            return text, []
        if text[0] == " " and len(text) > 1:
            return text[1:], []
        if text[0].isspace() or before[-1:].isspace():
            return "\n" + text, self._newline
        return text, []

    # Decoding

    @abstractmethod
    def decode_plain(self, ids: Sequence[int]) -> str:
        """Text of `ids`, none of which is a control token."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; control tokens are left out unless `skip_special` is false.

        Bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        ids = [int(token_id) for token_id in ids]
        for token_id in ids:
            self.check_id(token_id)
        if skip_special:
            return self.decode_plain([i for i in ids if i not in self.special_text])
        return "".join(
            self.special_text[item] if isinstance(item, int) else self.decode_plain(item)
            for item in self._runs(ids)
        )

    def _runs(self, ids: Sequence[int]) -> Iterator[int | list[int]]:
        """`ids` as control ids and lists of ordinary ids between them."""
        run: list[int] = []
        for token_id in ids:
            if token_id not in self.special_text:
                run.append(token_id)
                continue
            if run:
                yield run
            yield token_id
            run = []
        if run:
            yield run

    def check_id(self, token_id: int) -> None:
        """`DataError` unless `token_id` is in the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise DataError(
                f"token id {token_id} is not in the vocabulary of {self.name}, whose ids are 0 to "
                f"{self.vocab_size - 1}: was it made with another tokenizer?"
            )

    def stream(self) -> StreamDecoder:
        """A decoder that takes ids one by one; control tokens give no text."""
        return WindowStreamDecoder(self)

    # Chat

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the template writes it, control tokens spelled out.

        Raises:
            DataError: no template, malformed messages, or the template refuses them.
        """
        return render(
            self.require_template(),
            messages,
            self.chat_variables(add_generation_prompt=add_generation_prompt, **variables),
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of the conversation.

        Control tokens come from the template alone: the text of one inside a message is
        encoded as ordinary characters. So it is in `variables`, of which tools are one.
        """
        template = self.require_template()
        (sealed, own), mark = seal([messages, variables], self.special_pattern)
        text = render(
            template,
            sealed,
            self.chat_variables(add_generation_prompt=add_generation_prompt, **own),
        )
        check_text(text)
        ids: list[int] = []
        for piece, token_id in split_special(text, self.special_pattern, self.special.ids):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids.extend(self.encode_plain(unseal(piece, mark)))
        return ids

    def require_template(self) -> str:
        """The chat template; `DataError` where there is none."""
        if self.chat_template is None:
            raise DataError(
                f"{self.name} has no chat template: put a chat_template.jinja beside it, or ask "
                f"for a built-in one with chat_template={', '.join(map(repr, BUILT_IN))}"
            )
        return self.chat_template

    def chat_variables(self, *, add_generation_prompt: bool, **variables: Any) -> dict[str, Any]:
        """What a chat template sees besides the messages; as in transformers, tools and documents
        are null where there are none.
        """
        return {
            "tools": None,
            "documents": None,
            "bos_token": self._token_text(self.bos_id),
            "eos_token": self._token_text(self.eos_id),
            "pad_token": self._token_text(self.pad_id),
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.special_text.get(token_id, "")

    # Saving

    @abstractmethod
    def vocabulary_file(self) -> tuple[str, bytes]:
        """Name and content of the file that holds the vocabulary, as it goes into a model."""

    def save(self, directory: str | Path) -> list[Path]:
        """Write the tokenizer into a model directory; returns the files written.

        The vocabulary file, tokenizer_config.json and, where there is a template,
        chat_template.jinja: `load_tokenizer(directory)` then gives an equal tokenizer.
        """
        target = Path(directory)
        name, content = self.vocabulary_file()
        config = json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n"
        files = {name: content, "tokenizer_config.json": config.encode()}
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template.encode()
        return [write_whole(target / name, content) for name, content in files.items()]

    def _config(self) -> dict[str, Any]:
        """tokenizer_config.json in Hugging Face's spelling."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(token_id): {"content": text, "special": True}
                for token_id, text in sorted(self.special_text.items())
            },
            "clean_up_tokenization_spaces": False,
        }
        for key, token_id in (
            ("bos_token", self.bos_id),
            ("eos_token", self.eos_id),
            ("pad_token", self.pad_id),
        ):
            if token_id is not None:
                config[key] = self._token_text(token_id)
        if len(self.eos_ids) > 1:
            config["eos_token_ids"] = list(self.eos_ids)
        return config


def check_text(text: str) -> None:
    """`DataError` unless `text` is a str that UTF-8 can hold."""
    if not isinstance(text, str):
        raise DataError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is not Unicode text: remove or replace it"
        ) from None


def split_special(
    text: str, pattern: re.Pattern[str] | None, ids: Mapping[str, int]
) -> Iterator[tuple[str, int | None]]:
    """Cut `text` at control tokens: (text, None) for ordinary parts, (text, id) for tokens."""
    start = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > start:
            yield text[start : match.start()], None
        yield match.group(), ids[match.group()]
        start = match.end()
    if start < len(text):
        yield text[start:], None
