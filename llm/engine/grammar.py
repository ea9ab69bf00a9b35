"""Answers that obey a grammar: JSON schemas, regular expressions, choices, Lark and GBNF.

llguidance says after each token which ones may follow. It works on the tokens' bytes, so an answer
is held to its grammar however it is cut into tokens.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from common.errors import UserError
from data.tokenization.added_tokens import Region
from data.tokenizer import Tokenizer

KINDS = ("json_schema", "json_object", "regex", "choice", "lark", "gbnf")

# Between the parts of JSON a space or none: small models go on with blanks for ever where they may.
JSON_OPTIONS: Any = {"whitespace_pattern": " ?"}
_BYTES = llguidance.LLTokenizer("byte")
# llguidance makes all states at once and has no limit: 30011 takes 0.3 s, 2**30 did not end.
_MOST_STEP = 10_000
_MULTIPLE = re.compile(r'multipleOf[\\]*"(?:\s|\\+[nrt])*:(?:\s|\\+[nrt])*([0-9.]+)')
_ESCAPED = re.compile(r"\\+u00([0-7][0-9a-fA-F])")
_KEPT = 64  # compiled grammars, of the answers that may run together and those that come again


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.bos_token_id = tokenizer.bos_id
        known = tokenizer.vocab_size
        names = [tokenizer.token_bytes(one) for one in range(known)]
        for token_id, text in tokenizer.special_text.items():
            names[token_id] = text.encode()
        # Ids that the model has beyond the tokenizer's stand for no text.
        names += [b"<|%d|>" % one for one in range(known, vocab_size)]
        self.tokens = names
        self.special_token_ids = [*tokenizer.special_text, *range(known, vocab_size)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        # Inside a text: sentencepiece's space before it would be one that is not there.
        return self._tokenizer.encode_regions([Region((text,), "bare")])[0].ids


class Matcher:
    """How far an answer has come in its grammar; one sequence's, and mutable."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        # Guesses behind which the matcher stands: going back over them copies nothing.
        self._ahead: list[int] = []

    def _look(self, guesses: Sequence[int]) -> None:
        """Stand behind guesses, as far as they are allowed; from those of the last call."""
        same = 0
        while same < min(len(guesses), len(self._ahead)) and guesses[same] == self._ahead[same]:
            same += 1
        if same < len(self._ahead):
            self._matcher.rollback(len(self._ahead) - same)
            del self._ahead[same:]
        for token_id in guesses[same:]:
            # Behind an end, as behind a guess that is not allowed, it stays where it is.
            if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token_id]):
                break
            self._ahead.append(token_id)

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens may come, one after the other."""
        self._look(())
        count: int = self._matcher.validate_tokens(list(tokens))
        return count

    def take(self, token_id: int) -> None:
        """Go on with a token.

        Raises:
            UserError: the grammar does not allow it, or has grown beyond llguidance's limits.
        """
        if self._ahead and self._ahead[0] == token_id:
            del self._ahead[0]  # it stands behind it already
            return
        self._look(())
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token_id):
            raise self._stuck()

    def allowed(self, guesses: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Return which tokens ``[V]`` may come next; where nothing may, the end tokens.

        Args:
            guesses: tokens that are taken to have come, as far as they are allowed.

        Raises:
            UserError: the grammar has grown beyond llguidance's limits.
        """
        self._look(guesses)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._stuck()
        allowed: NDArray[np.bool_] = np.unpackbits(
            bits, count=self._vocab_size, bitorder="little"
        ).view(np.bool_)
        return allowed

    def _stuck(self) -> UserError:
        # Behind the first line stands the whole state of the parser.
        why = self._matcher.get_error().partition("\n")[0]
        return UserError(f"the grammar cannot go on: {why}")


class Grammar:
    """A grammar in the tokens of one model; many answers may follow it at a time."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> Matcher:
        """Return the state before the first token."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Compiles grammars for one model.

    Args:
        tokenizer: the model's.
        vocab_size: of the model.
        eos_ids: tokens that end an answer.

    Raises:
        UserError: no token ends an answer, or one of the tokenizer has no bytes of its own.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        if not eos_ids:
            raise UserError("a grammar needs a token that ends an answer; the model names none")
        vocabulary = _Vocabulary(tokenizer, vocab_size, eos_ids[0])
        wrapped = llguidance.TokenizerWrapper(vocabulary)
        self._compiled: OrderedDict[tuple[str, Any], Grammar] = OrderedDict()
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=list(eos_ids))

    def compile(self, kind: str, source: Any = "") -> Grammar:
        """Compile one grammar; one of the last is taken as it is.

        Args:
            kind: of ``json_schema`` (source: a schema, as an object or JSON), ``json_object``
                (anything goes; source is not looked at), ``regex``, ``choice`` (a list of texts),
                ``lark`` (llguidance's dialect) and ``gbnf`` (llama.cpp's; Lark's is taken, too).
            source: the grammar.

        Raises:
            UserError: a kind that is not known, or a grammar that llguidance refuses, with its
                message.
        """
        text = _source(kind, source)
        if (found := self._compiled.pop((kind, text), None)) is None:
            matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0)
            if matcher.is_error():
                raise _refusal(kind, matcher.get_error())
            _check_first(kind, matcher)
            found = Grammar(matcher, self._vocab_size)
        self._compiled[kind, text] = found  # the last ones stay
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return found


def check(kind: str, source: Any = "") -> None:
    """Refuse a grammar that no model could follow, or no answer obeys; needs no tokenizer.

    Args:
        kind, source: as :meth:`Grammars.compile` takes them.

    Raises:
        UserError: see :meth:`Grammars.compile`.
    """
    text = _source(kind, source)
    is_error, said = llguidance.LLMatcher.validate_grammar_with_warnings(text)
    if is_error:
        raise _refusal(kind, said[0])
    # In bytes: a grammar that names control tokens is unknown there, and goes without this look.
    matcher = llguidance.LLMatcher(_BYTES, text, log_level=0)
    if not matcher.is_error():
        _check_first(kind, matcher)


def _check_first(kind: str, matcher: Any) -> None:
    """Refuse a grammar that allows no first token and no empty answer."""
    matcher = matcher.deep_copy()
    matcher.compute_bitmask()
    if matcher.is_error():
        raise UserError(
            f"the {kind} allows no answer at all; look for a reference or a rule to itself, or an "
            "empty set of characters"
        )


def _refusal(kind: str, error: str) -> UserError:
    why = " ".join(error.split())
    return UserError(f"the {kind} cannot be followed: {why[:300] or 'no reason said'}")


def _source(kind: str, source: Any) -> str:
    """Return a grammar in llguidance's own form."""
    text = _translated(kind, source)
    if kind != "choice":
        _check_multiples(text)
    return text


def _check_multiples(text: str) -> None:
    """Refuse what numbers have to be multiples of where that takes too many states."""
    plain = _ESCAPED.sub(lambda code: chr(int(code[1], 16)), text)
    found = [one.rstrip("0") if "." in one else one for one in _MULTIPLE.findall(plain)]
    places = [len(one.partition(".")[2]) for one in found]
    # One number may have to obey all of them; then what counts is the least common multiple.
    merged = max(places, default=0) if "allOf" in plain or "$ref" in plain else None
    together = 1
    for number, place in zip(found, places, strict=True):
        digits = number.replace(".", "") + "0" * (0 if merged is None else merged - place)
        digits = digits.lstrip("0") or "1"
        step = int(digits) if len(digits) <= 20 else 10**20 + 1
        together = step if merged is None else math.lcm(together, step)
        if together > _MOST_STEP and str(together).strip("0") != "1":
            raise UserError(
                f"multipleOf: {number:.40} takes too many states to be held, alone or with those "
                f"before it; take 1 to {_MOST_STEP} or a power of ten, decimals counted in their "
                "last digit, or leave it out and look at the answer"
            )


def _translated(kind: str, source: Any) -> str:
    make = llguidance.LLMatcher
    if kind in ("json_schema", "json_object"):
        schema = {"type": "object"} if kind == "json_object" else source
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            found: str = make.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
        except ValueError as error:
            raise UserError(f"the json_schema is no JSON object: {str(error)[:300]}") from None
        return found
    if kind == "choice":
        if not source or not all(isinstance(one, str) and one for one in source):
            raise UserError(f"choice={source!r} has to be a list of texts that are not empty")
        return str(make.grammar_from_lark("start: " + " | ".join(map(json.dumps, source))))
    if kind == "regex":
        return str(make.grammar_from_regex(source))
    if kind == "lark":
        return str(make.grammar_from_lark(source))
    if kind == "gbnf":
        try:
            return str(make.grammar_from_lark(any_to_lark(source)))
        except Exception as error:  # noqa: BLE001 - a converter in Python, which raises anything
            raise UserError(f"the gbnf cannot be read: {error}") from None
    raise UserError(f"a grammar of kind {kind!r} is not known; there are {', '.join(KINDS)}")
