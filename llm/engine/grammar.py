"""Answers that obey a grammar: JSON schemas, regular expressions, choices, Lark and GBNF.

llguidance says after each token which ones may follow. It works on the tokens' bytes, so an answer
is held to its grammar however it is cut into tokens.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from numpy.typing import NDArray

from common.errors import UserError
from data.tokenization.added_tokens import Region
from data.tokenizer import Tokenizer

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark", "gbnf"]
KINDS: tuple[Kind, ...] = ("json_schema", "json_object", "regex", "choice", "lark", "gbnf")

# Between the parts of JSON a space or none: small models go on with blanks for ever where they may.
_JSON: Any = {"whitespace_pattern": " ?"}


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
            raise UserError(f"the grammar cannot go on: {self._matcher.get_error()}")

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
            raise UserError(f"the grammar cannot go on: {self._matcher.get_error()}")
        allowed: NDArray[np.bool_] = np.unpackbits(
            bits, count=self._vocab_size, bitorder="little"
        ).view(np.bool_)
        return allowed


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
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=list(eos_ids))

    def compile(self, kind: Kind, source: Any) -> Grammar:
        """Compile one grammar.

        Args:
            kind: of ``json_schema`` (source: a schema, as an object or JSON), ``json_object``
                (anything goes; source is not looked at), ``regex``, ``choice`` (a list of texts),
                ``lark`` (llguidance's dialect) and ``gbnf`` (llama.cpp's).
            source: the grammar.

        Raises:
            UserError: a kind that is not known, or a grammar that llguidance refuses, with its
                message.
        """
        matcher = llguidance.LLMatcher(self._tokenizer, _source(kind, source), log_level=0)
        if matcher.is_error():
            why = matcher.get_error().strip().splitlines()
            raise UserError(f"the {kind} cannot be followed: {why[0] if why else 'no reason said'}")
        return Grammar(matcher, self._vocab_size)


def _source(kind: Kind, source: Any) -> str:
    """Return a grammar in llguidance's own form."""
    make = llguidance.LLMatcher
    if kind in ("json_schema", "json_object"):
        schema = {"type": "object"} if kind == "json_object" else source
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            found: str = make.grammar_from_json_schema(schema, overrides=_JSON)
        except ValueError as error:
            raise UserError(f"the json_schema is no JSON object: {error}") from None
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
