"""Detokenising and stop strings, compared with a character-by-character search."""

import random

import pytest
from fakes import EOS, FakeTokenizer

from data.tokenizer import load_tokenizer
from llm.engine.request import Token
from llm.llama.config import TINY_NAME
from llm.serving.text import StopScanner, TextAssembler


def cut_by_hand(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read one character at a time and stop at the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("seed", range(300))
def test_any_cutting_into_tokens_gives_the_text_before_the_stop(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 30)))
    stops = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 5))) for _ in range(3)]
    expected, matched = cut_by_hand(text, stops)
    scanner, shown, position = StopScanner(stops), 0, 0
    while position < len(text) and scanner.matched is None:
        size = rng.randint(0, 4)
        safe = scanner.push(text[position : position + size])
        position += size
        assert safe >= shown, "what was shown cannot be taken back"
        assert text[:safe] == expected[:safe], "only text before the stop string is shown"
        shown = safe
    assert scanner.matched == matched
    if matched is not None:
        assert text[:shown] == expected


def test_only_a_possible_beginning_is_held_back() -> None:
    scanner = StopScanner(["<end>"])
    assert scanner.push("abc<e") == 3
    assert scanner.push("xy") == 7
    assert scanner.push("<end") == 7
    assert scanner.push(">") == 7
    assert scanner.matched == "<end>"


def assemble(text: str, stops: list[str], words: tuple[str, ...], reason: str) -> TextAssembler:
    tokenizer = FakeTokenizer(words)
    ids = tokenizer.encode(text)
    if reason == "stop":
        ids.append(EOS)
    assembler = TextAssembler(tokenizer.stream(), stops)
    for position, token_id in enumerate(ids):
        last = position == len(ids) - 1
        assembler.push(Token(token_id, -1.0, reason if last else None))
        if assembler.answer.finish_reason != "abort":
            break
    return assembler


@pytest.mark.parametrize("words", [(), ("ab", "cST", "OP d"), ("abcSTOP def",)])
def test_stop_string_across_tokens(words: tuple[str, ...]) -> None:
    answer = assemble("abcSTOP def", ["STOP"], words, "stop").answer
    assert (answer.text, answer.finish_reason, answer.matched_stop) == ("abc", "stop", "STOP")


def test_text_without_a_stop_string_is_complete() -> None:
    answer = assemble("abcSTO", ["STOP"], ("ab", "cS"), "stop").answer
    assert (answer.text, answer.finish_reason, answer.matched_stop) == ("abcSTO", "stop", None)
    assert answer.num_tokens == 5, "ab, cS, T, O and the end token"
    assert [piece.special for piece in answer.pieces] == [False] * 4 + [True]


def test_characters_of_several_tokens_are_never_shown_in_halves() -> None:
    answer = assemble("中é🙂", [], (), "length").answer
    assert [piece.text for piece in answer.pieces] == ["", "", "中", "", "é", "", "", "", "🙂"]
    assert answer.finish_reason == "length"


def test_a_character_that_the_length_limit_cuts_is_replaced() -> None:
    tokenizer = FakeTokenizer()
    ids = tokenizer.encode("a🙂")[:3]
    assembler = TextAssembler(tokenizer.stream(), ["X"])
    for token_id, reason in zip(ids, (None, None, "length"), strict=True):
        assembler.push(Token(token_id, -1.0, reason))
    assert assembler.answer.text == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("seed", range(40))
def test_a_stop_string_that_is_kept_ends_the_text(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(20))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(2, 4))) for _ in range(2)]
    before, matched = cut_by_hand(text, stops)
    tokenizer = FakeTokenizer(("ab", "bba", "aaa"))
    assembler = TextAssembler(tokenizer.stream(), stops, keep_stop=True)
    for token_id in tokenizer.encode(text):
        assembler.push(Token(token_id, -1.0))
        if assembler.answer.finish_reason != "abort":
            break
    assert assembler.answer.matched_stop == matched
    if matched is not None:
        assert assembler.answer.text == before + matched


@pytest.mark.parametrize("keep", [False, True])
def test_control_tokens_are_spelled_out_where_they_are_wanted(keep: bool) -> None:
    """Between half a character and the next text; the end token only where the end is kept."""
    tokenizer = load_tokenizer(TINY_NAME)
    first, last = tokenizer.bos_id, tokenizer.eos_ids[0]
    ids = [*tokenizer.encode("é")[:-1], first, *tokenizer.encode(" x"), last]
    assembler = TextAssembler(
        tokenizer.stream(), (), keep_stop=keep, control=tokenizer.special_text
    )
    for token_id in ids:
        assembler.push(Token(token_id, -1.0, "stop" if token_id == last else None))
    whole = tokenizer.decode(ids, skip_special=False)
    end = tokenizer.special_text[last]
    assert assembler.answer.text == (whole if keep else whole.removesuffix(end))
