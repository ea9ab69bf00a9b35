"""What every tokenizer can do, whatever file it was read from."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from common.errors import DataError
from common.files import write_whole
from data.tokenization.added_tokens import (
    AddedToken,
    Region,
    RegionIds,
    SpecialTokens,
    Start,
    pattern,
    split_special,
)
from data.tokenization.chat import (
    BUILT_IN,
    Message,
    render,
    render_open,
    seal,
    unseal,
    variables_of,
)
from data.tokenization.fence import check_text
from data.tokenization.model_files import ALWAYS, CONFIG, DEFAULT, TEMPLATES, Declared, config_of
from data.tokenization.packed import PackedEncoder, PlainEncoder
from data.tokenization.stream import StreamDecoder, WindowStreamDecoder

# The template that is taken where a conversation has tools.
TOOL_USE = "tool_use"


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        name: the kind and the file's name, for messages.
        vocab_size: number of ids; every id is below it.
        special: the control tokens.
        added: all tokens beside the vocabulary proper, by id: control tokens, and others that are
            found in any text and shown in answers.
        fingerprint: sha256 (hex) of the vocabulary file and of tokens added beside it. Two
            tokenizers with the same fingerprint give the same ids for the same text.
        templates: chat templates, Jinja source by name.
        prefix: where a space is put before text: always, first or never (sentencepiece).
    """

    name: str
    vocab_size: int
    special: SpecialTokens
    added: Mapping[int, AddedToken]
    fingerprint: str
    templates: Mapping[str, str]

    def __init__(
        self,
        *,
        name: str,
        vocab_size: int,
        special: SpecialTokens,
        added: Mapping[int, AddedToken],
        own: Mapping[int, AddedToken],
        content: bytes,
        declared: Declared,
        templates: Mapping[str, str],
        source: Path,
        prefix: str = ALWAYS,
    ) -> None:
        for token_id, token in added.items():
            if not 0 <= token_id < vocab_size:
                raise DataError(
                    f"{source}: added token {token.content!r} has id {token_id}, but the "
                    f"vocabulary has ids 0 to {vocab_size - 1}: the tokenizer files do not belong "
                    "together"
                )
        self.name = name
        self.vocab_size = vocab_size
        self.special = special
        self.added = added
        self.templates = templates
        self.source = source
        self.prefix = prefix
        self.fingerprint = self._fingerprint(content, own)
        self._content = content
        self._declared = declared
        self._left_out: int | None = None

    def _fingerprint(self, content: bytes, own: Mapping[int, AddedToken]) -> str:
        """A digest of the vocabulary, and of what a directory adds that changes ids.

        `own` is what the vocabulary file has alone.
        """
        beside = [
            (token_id, token.fields())
            for token_id, token in sorted(self.added.items())
            if token != own.get(token_id) and not (token.special and token_id in own)
        ]
        if beside or self.prefix != ALWAYS:
            content += json.dumps([beside, self.prefix]).encode()
        return hashlib.sha256(content).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # The libraries' own pickles forget settings.
        made = (self.source, self._content, self._declared, self.templates)
        return type(self), made, self._left_out

    def __setstate__(self, left_out: int) -> None:
        self.leave_out_pad()

    @property
    def chat_template(self) -> str | None:
        """Jinja source for conversations, or None where the model has none.

        Raises:
            DataError: the model has some, and none of them is the default.
        """
        if self.templates and DEFAULT not in self.templates:
            raise DataError(
                f"{self.name} has the chat templates {', '.join(sorted(self.templates))} and none "
                f"called {DEFAULT!r}: choose one by its name with --chat_template"
            )
        return self.templates.get(DEFAULT)

    @property
    def declared_config(self) -> Mapping[str, Any]:
        """tokenizer_config.json as it was read; empty where there is none."""
        return self._declared.config

    def leave_out_pad(self) -> None:
        """Let the last id, the pad token's, not exist: a model has no embedding for it."""
        assert self.pad_id == self.vocab_size - 1
        self._left_out = self.pad_id
        self.vocab_size -= 1
        ids = {
            text: token_id for text, token_id in self.special.ids.items() if token_id != self.pad_id
        }
        self.special = replace(self.special, ids=ids, pad_id=None)
        for cached in ("special_text", "special_pattern"):
            self.__dict__.pop(cached, None)

    @property
    def bos_id(self) -> int | None:
        """Id that begins a sequence, or None."""
        return self.special.bos_id

    @property
    def adds_bos(self) -> bool:
        """Whether a text that stands alone begins with BOS: where there is one, unless
        `add_bos_token` of tokenizer_config.json, or of the caller, says no.
        """
        return self.bos_id is not None and self._declared.config.get("add_bos_token") is not False

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
        return pattern(self.special.ids)

    # Encoding

    @abstractmethod
    def encode_regions(
        self,
        regions: Sequence[Region],
        *,
        threads: int = 1,
        encoder: PackedEncoder | None = None,
    ) -> list[RegionIds]:
        """Ids of each region, in whose texts nothing is a control token.

        Args:
            regions: texts in valid Unicode, and ids.
            threads: of the library.
            encoder: `packed_encoder` of this tokenizer, where much text makes it worth having.

        Raises:
            DataError: the library cannot encode a text.
        """

    @abstractmethod
    def _encode_marked(self, text: str) -> list[int]:
        """Ids of `text`, in which the texts of control tokens are control tokens."""

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, in which nothing is a control token. `text` is valid Unicode."""
        return self.encode_regions([Region((text,))])[0].ids

    def encode_plain_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """`encode_plain` of each text, by the library's own batch call."""
        return self._encode_batch(texts, [False] * len(texts), threads)

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
                for that the tokenizer does not have; the library cannot encode it.
        """
        check_text(text)
        ids = self._encode_marked(text) if allow_special else self.encode_plain(text)
        if self._left_out is not None and self._left_out in ids:
            self.check_id(self._left_out)
        before, after = self.affixes(add_bos=add_bos, add_eos=add_eos)
        return [*before, *ids, *after]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model goes on from, behind BOS where `adds_bos` says so.

        Raises:
            DataError: see `encode`; there are no ids to go on from.
        """
        ids = self.encode(text, add_bos=self.adds_bos)
        if not ids:
            raise DataError(
                "the prompt is empty and no BOS token stands before it, so there is nothing to go "
                "on from: give some text"
            )
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

    def packed_encoder(self, dtype: DTypeLike, characters: int | None = None) -> PackedEncoder:
        """An encoder of much text, so many `characters` if that is known, to arrays of `dtype`."""
        del characters
        return PlainEncoder(self._encode_batch, np.dtype(dtype))

    def _encode_batch(
        self, texts: Sequence[str], bare: Sequence[bool], threads: int
    ) -> list[list[int]]:
        regions = [
            Region((text,), "bare" if inside else "begin")
            for text, inside in zip(texts, bare, strict=True)
        ]
        return [row.ids for row in self.encode_regions(regions, threads=threads)]

    @cached_property
    def adds_space(self) -> bool:
        """Whether text after an added token is encoded as if a space stood before it."""
        after, inside = (Region(("x",), start) for start in ("token", "bare"))
        return self.encode_regions([after]) != self.encode_regions([inside])

    def start_after(self, text: str, before: str) -> Start:
        """How `text` begins where it goes on from `before` instead of standing alone.

        A tokenizer that puts a space before any text would put it inside the line: "[/INST] Yes"
        would get two, "Assistant:\\nYes" one that is not there. Where neither side has white
        space the added space stays and separates them, as it does in PaddleNLP's {src, tgt}.
        """
        if self.adds_space and text and not text[0].isspace() and not before[-1:].isspace():
            return "token"
        return "bare"

    # Decoding

    @abstractmethod
    def decode_tokens(self, ids: Sequence[int]) -> str:
        """Text of `ids`, in which added tokens of any kind are spelled out."""

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
            ids = [token_id for token_id in ids if token_id not in self.special_text]
        return self.decode_tokens(ids)

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for inside a text; none for control tokens.

        Raises:
            DataError: an id that is not in the vocabulary; a tokenizer whose text of a token hangs
                on its neighbours.
        """

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
            self.require_template(tools=bool(variables.get("tools"))),
            messages,
            self.chat_variables(add_generation_prompt=add_generation_prompt, **variables),
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Ids of the conversation, up to where the last message's text ends if that is continued.

        Control tokens come from the template alone: the text of one inside a message is
        encoded as ordinary characters. So it is in `variables`, of which tools are one.
        """
        template = self.require_template(tools=bool(variables.get("tools")))
        (sealed, own), mark = seal([messages, variables], self.special_pattern)
        begins = add_generation_prompt and not continue_final_message
        known = self.chat_variables(add_generation_prompt=begins, **own)
        write = render_open if continue_final_message else render
        text = write(template, sealed, known)
        check_text(text)
        return self.encode_regions([Region(tuple(self.control_parts(text, mark)))])[0].ids

    def control_parts(self, text: str, mark: str) -> Iterator[str | int]:
        """A rendering of what `seal` has sealed, cut at its control tokens, which become ids."""
        for piece, token_id in split_special(text, self.special_pattern, self.special.ids):
            yield unseal(piece, mark) if token_id is None else token_id

    def template_variables(self, *, tools: bool = False) -> frozenset[str]:
        """Names that the chat template asks for; see `require_template`."""
        return variables_of(self.require_template(tools=tools))

    def require_template(self, *, tools: bool = False) -> str:
        """The chat template, with `tools` the one for them if there is one of its own.

        Raises:
            DataError: there is none.
        """
        if tools and TOOL_USE in self.templates:
            return self.templates[TOOL_USE]
        if self.chat_template is None:
            raise DataError(
                f"{self.name} has no chat template: put a chat_template.jinja beside it, or ask "
                f"for a built-in one with chat_template={', '.join(map(repr, BUILT_IN))}"
            )
        return self.chat_template

    def chat_variables(self, *, add_generation_prompt: bool, **variables: Any) -> dict[str, Any]:
        """What a chat template sees besides the messages; absent tools and documents are null."""
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

    @abstractmethod
    def vocabulary_file(self) -> tuple[str, bytes]:
        """Name and content of the file that holds the vocabulary, as it goes into a model."""

    def save(self, directory: str | Path) -> list[Path]:
        """Write the tokenizer into a model directory; returns the files written.

        The vocabulary file, tokenizer_config.json with all that the directory said, and the chat
        templates: `load_tokenizer(directory)` then gives an equal tokenizer.
        """
        target = Path(directory)
        name, content = self.vocabulary_file()
        config = json.dumps(self.config(), indent=2, ensure_ascii=False) + "\n"
        files = {name: content, CONFIG: config.encode()}
        for name, template in self.templates.items():
            place = "chat_template.jinja" if name == DEFAULT else f"{TEMPLATES}/{name}.jinja"
            files[place] = template.encode()
            (target / place).parent.mkdir(parents=True, exist_ok=True)
        return [write_whole(target / name, content) for name, content in files.items()]

    def config(self) -> dict[str, Any]:
        """Return tokenizer_config.json in Hugging Face's spelling."""
        pad = self._left_out if self.pad_id is None else self.pad_id
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": pad}
        return config_of(self._declared, self.added, named, self.eos_ids)
