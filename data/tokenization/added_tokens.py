"""Tokens added to a vocabulary: what a directory says of them, and texts cut at them.

Which text becomes which added token, with the white space beside it, is decided by the `tokenizers`
library, as in transformers, whatever library encodes the rest.
"""

import functools
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import tokenizers

from common.errors import DataError
from data.tokenization.fence import fenced

# Kinds of named tokens, in transformers' order; each is added where the vocabulary lacks it.
NAMED = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_UNKNOWN = "unknown"
# Characters of private use, of which marks are made that stand in no text.
_PRIVATE = 0xF0000
# Letters that hardly any text has: CJK unified ideographs of extension G.
_RARE = 0x30000
_MARK = 6
# Tokens with which the library is asked about a character.
_SINGLE, _TAKING = "#", "<"


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


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary proper, with the fields of Hugging Face's `AddedToken`.

    Attributes:
        content: its text.
        special: it steers and is not shown; others, such as <think>, are text of an answer.
        lstrip, rstrip: it takes the white space before, or after, it with it.
        single_word: it is no token inside a word.
        normalized: it is looked for in normalized text, and after the others.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True

    def fields(self) -> dict[str, Any]:
        """The object that stands for it in tokenizer_config.json."""
        return asdict(self)

    def library(self, content: str | None = None) -> tokenizers.AddedToken:
        """The library's object; with `content`, of a stand-in, which is never special."""
        flags = {name: getattr(self, name) for name in _FLAGS}
        if content is not None:
            flags["special"] = False
        return tokenizers.AddedToken(content or self.content, **flags)


def read_token(value: Any, where: str, *, special: bool | None = None) -> AddedToken:
    """An added token from a text, or from an object of a JSON file.

    Args:
        value: the text or the object.
        where: file and key, for messages.
        special: what it is whatever the object says; texts are special when it is None.

    Raises:
        DataError: neither a text nor an object with a content.
    """
    given: Any = {"content": value, "special": True} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("content"), str):
        raise DataError(
            f'{where} must be a text or look like {{"content": "<pad>"}}, got {value!r}'
        )
    flags = {name: given[name] for name in _FLAGS if name in given}
    wrong = [name for name, flag in flags.items() if not isinstance(flag, bool)]
    if wrong:
        raise DataError(f"{where}: {wrong[0]} must be true or false, got {flags[wrong[0]]!r}")
    if special is not None:
        flags["special"] = special
    return AddedToken(given["content"], **{"normalized": not flags.get("special"), **flags})


def of_library(token: tokenizers.AddedToken) -> AddedToken:
    """The library's object as ours."""
    return AddedToken(token.content, **{name: getattr(token, name) for name in _FLAGS})


_PLAIN = AddedToken("", normalized=False)


class Cut(NamedTuple):
    """Part of a text: a token, or the text between two.

    Attributes:
        text: what stands between tokens; "" for one.
        token_id: of a token; None for text.
        given: the token was given as an id and not found in the text.
    """

    text: str
    token_id: int | None = None
    given: bool = False


Start = Literal["begin", "token", "bare"]


class Region(NamedTuple):
    """Text with tokens in it that are given as ids.

    `start` says what stands before: "begin" nothing, "token" an added token, "bare" text that it
    goes on from, so that no space is put before it.
    """

    parts: tuple[str | int, ...]
    start: Start = "begin"


class RegionIds(NamedTuple):
    """Ids of a region, and where among them those of its parts that were ids are."""

    ids: list[int]
    marks: list[int]


class StandIns:
    """Texts in the place of tokens that are given as ids.

    Each is an added token of the library with the flags of the one it stands for, under a content
    that no text has, so that what it takes with it is what that one takes.
    """

    def __init__(self, library: tokenizers.Tokenizer, added: Mapping[int, AddedToken]) -> None:
        self._library = library
        self._added = added
        self._texts: dict[int, str] = {}
        self.tokens: dict[int, int] = {}
        self._mark = "".join(chr(_PRIVATE + secrets.randbelow(0xFFFD)) for _ in range(_MARK))
        self._letter = chr(_RARE + secrets.randbelow(0x1000))
        self._plain = -1

    def text(self, token_id: int) -> str:
        """What to write for a token."""
        if token_id not in self._texts:
            # Not all are made at once: each of hundreds of added tokens makes the library slower.
            self._make(token_id, self._added.get(token_id, _PLAIN))
        return self._texts[token_id]

    def before(self) -> str:
        """What to write before a text that does not begin where it begins."""
        return self.text(self._plain)

    def _make(self, token_id: int, token: AddedToken) -> None:
        # At its ends it is what the token is: of words or not, which its neighbours may mind.
        first, last = (
            self._letter if _of_words(end) else ""
            for end in (token.content[:1], token.content[-1:])
        )
        content = first + self._mark + chr(_PRIVATE + len(self._texts)) + last
        self._library.add_tokens([token.library(content)])
        self._texts[token_id] = content
        self.tokens[self._library.token_to_id(content)] = token_id

    def write(self, parts: Sequence[str | int]) -> str:
        """Texts and ids as one text.

        Tokens are spelled out that are not found where they stand: those of single words inside a
        word, and those of white space that begin where one before them has taken it (`lstrip`).
        """
        spelled = [one if isinstance(one, str) else self._added[one].content for one in parts]
        written = list(spelled)
        taking = False
        for index, part in enumerate(parts):
            blank = _blank(spelled[index])
            if isinstance(part, int):
                token = self._added[part]
                taken = taking and blank and token.lstrip
                if not taken and not (token.single_word and _in_word(spelled, index)):
                    written[index] = self.text(part)
                    taking = token.rstrip
                    continue
            taking = taking and blank
        return "".join(written)


class Cutter:
    """Cuts texts at added tokens, for libraries that know none.

    Args:
        added: the tokens by id.
    """

    def __init__(self, added: Mapping[int, AddedToken]) -> None:
        self._library = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({_UNKNOWN: 0}, unk_token=_UNKNOWN)
        )
        self._library.add_tokens([added[token_id].library() for token_id in sorted(added)])
        self._ids = {
            self._library.token_to_id(token.content): token_id for token_id, token in added.items()
        }
        self._stand_ins = StandIns(self._library, added)
        self._any = pattern(token.content for token in added.values())
        self._plain = pattern(token.content for token in added.values() if not token.special)

    def finds(self, text: str, *, special: bool) -> bool:
        """Whether the text of an added token stands in `text`."""
        wanted = self._any if special else self._plain
        return wanted is not None and wanted.search(text) is not None

    def cut(self, parts: Sequence[str | int], *, special: bool = False) -> list[Cut]:
        """Texts and ids as one text, cut at the tokens in it.

        Args:
            parts: texts, and ids of tokens between them.
            special: whether special tokens are found in texts, or only the others.
        """
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts) == 1 and not self.finds(texts[0], special=special):
            return [Cut(texts[0])] if texts[0] else []
        text = self._stand_ins.write(parts)
        self._library.encode_special_tokens = not special
        with fenced("the tokenizers library", [text]):
            found = self._library.encode(text, add_special_tokens=False)
        cuts = []
        for token_id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if token_id in self._stand_ins.tokens:
                cuts.append(Cut("", self._stand_ins.tokens[token_id], given=True))
            elif token_id in self._ids:
                cuts.append(Cut("", self._ids[token_id]))
            else:
                cuts.append(Cut(text[start:stop]))
        return cuts


def pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the texts, the longest first; None for none."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _in_word(texts: Sequence[str], index: int) -> bool:
    """Whether a letter stands beside one of some texts."""
    before = next((text[-1] for text in reversed(texts[:index]) if text), "")
    after = next((text[0] for text in texts[index + 1 :] if text), "")
    return _of_words(before) or _of_words(after)


def _of_words(character: str) -> bool:
    """Whether a character is one of words for the library."""
    return character != "" and _asked(_SINGLE + character)


def _blank(text: str) -> bool:
    """Whether a text is white space, or nothing, for the library."""
    return all(_asked(_TAKING + character) for character in text)


@functools.lru_cache(maxsize=1 << 14)
def _asked(text: str) -> bool:
    """Whether the library makes one thing of a token and the character after it.

    It is asked, as its tables of characters are not Python's: they know a newer Unicode, and what
    are letters and white space in regular expressions (UTS 18).
    """
    return len(_asking().encode(text, add_special_tokens=False)) == 1


@functools.cache
def _asking() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({_UNKNOWN: 0}, unk_token=_UNKNOWN))
    tokens = (AddedToken(_SINGLE, single_word=True), AddedToken(_TAKING, rstrip=True))
    library.add_tokens([token.library() for token in tokens])
    return library


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
