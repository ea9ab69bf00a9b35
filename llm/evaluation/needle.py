"""A needle in a haystack: one sentence in a long text that a model has to find again.

Lengths and depths are Kamradt's (2023, "LLMTest_NeedleInAHaystack"): a context of so many tokens,
and a place so many percent into its text, moved back to the end of a sentence that is near. What is
hidden is a number, so that an answer is right or wrong without a judge, as in RULER (Hsieh et al.
2024); a model that only goes on is asked with the beginning of the answer, as there.
"""

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from common.errors import UserError

DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)  # percent
# Where no length is named: so many, each half of the next, none shorter than this.
_LENGTHS, _SHORTEST = 4, 256
_SENTENCE = re.compile(r"""[.!?]["')\]]*\s+|\n\s*\n|[。！？][”’』」）]*\s*""")
_CHINESE = re.compile("[\u4e00-\u9fff]")
_CHINESE_SHARE = 0.2  # of the characters of a text that is asked about in Chinese
# Where a text may end: behind blanks, and on either side of a Chinese character or mark.
_CUT = re.compile("(?<=\\s)|(?<=[\u3000-\u9fff\uff00-\uffef])")
# Characters of the longest sentence and word at whose ends a needle or a text's end may lie.
_SENTENCE_LONGEST, _WORD_LONGEST = 400, 40
# What is longer than a word is cut so often: a character may be four tokens.
_STEP = 8
# Tokens by which needles may differ, and a context may lack of the length that is wanted.
_SLACK = 32


@dataclass(frozen=True)
class Wording:
    """How a language hides a number and asks for it.

    Attributes:
        needle: the sentence, of a name and a number.
        question: as a chat gets it.
        lead: the question for a model that goes on, with the answer begun.
        gap: between two sentences.
        names: of which each needle has one.
    """

    needle: str
    question: str
    lead: str
    gap: str
    names: tuple[str, ...]


ENGLISH = Wording(
    "The secret number of {name} is {number}.",
    "What is the secret number of {name}? Answer with the number alone.",
    "Question: What is the secret number of {name}?\nAnswer: The secret number of {name} is",
    " ",
    ("Lisbon", "Cairo", "Oslo", "Lima", "Hanoi", "Quito", "Dublin", "Nairobi", "Warsaw", "Denver"),
)
CHINESE = Wording(
    "{name}的秘密数字是{number}。",
    "{name}的秘密数字是多少？只回答数字。",
    "问题：{name}的秘密数字是多少？\n答案：{name}的秘密数字是",
    "",
    ("里斯本", "开罗", "奥斯陆", "利马", "河内", "基多", "都柏林", "内罗毕", "华沙", "丹佛"),
)


@dataclass(frozen=True)
class Trial:
    """One needle in one haystack.

    Attributes:
        length: of the context, in tokens, the answer included.
        depth: where it was wanted, in percent of the text.
        index: of this one among those of its length and depth, from 0.
        number: what has to be found.
        needle: the sentence that says it.
        text: the haystack with the needle.
        question: that follows it.
        place: where the needle begins, in percent of the text without it.
    """

    length: int
    depth: float
    index: int
    number: str
    needle: str
    text: str
    question: str
    place: float


def default_lengths(context: int) -> list[int]:
    """Return a model's context and its halves, shortest first."""
    halves = [context >> halvings for halvings in range(_LENGTHS)]
    return sorted(length for length in halves if length in (context, max(length, _SHORTEST)))


def wording_of(haystack: str) -> Wording:
    """Return the wording in the language of a text."""
    found = len(_CHINESE.findall(haystack))
    return CHINESE if found > _CHINESE_SHARE * len(haystack) else ENGLISH


def hide(text: str, needle: str, depth: float, gap: str) -> tuple[str, float]:
    """Put a sentence into a text, where a sentence ends; where none is near, behind a word.

    Returns:
        The text with it, and where it begins in percent of the text.
    """
    at = int(len(text) * depth / 100)
    for pattern, longest in ((_SENTENCE, _SENTENCE_LONGEST), (_CUT, _WORD_LONGEST)):
        ends = [found.end() for found in pattern.finditer(text)]
        place = [0, *ends, len(text)][bisect_right([*ends, len(text)], at)]
        if ends and at - place <= longest:
            at = place
            break
    before, after = text[:at], text[at:]
    if before and not before[-1].isspace():
        before += gap
    return f"{before}{needle}{gap if after else ''}{after}", 100 * at / max(len(text), 1)


def make_trials(
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    *,
    answer: int,
    context: int,
    chat: bool,
    count: Callable[[str, str], int],
) -> Iterator[Trial]:
    """Yield what is asked, length by length: every depth, every trial.

    Args:
        haystack: text of which each context takes the beginning.
        lengths: of contexts, in tokens.
        depths: in percent.
        trials: needles for each length and depth.
        answer: tokens that are kept for it.
        context: of the model, in tokens.
        chat: whether a chat is asked, or a model goes on.
        count: tokens of a prompt, from its text and its question.

    Raises:
        UserError: a length that holds no text beside the question, or exceeds the haystack.
    """
    wording = wording_of(haystack)
    # A token has rarely more than so many characters: what is beyond them is not needed.
    haystack = haystack[: 16 * max(lengths)].rstrip()
    cuts = _cuts(haystack)
    for length in lengths:
        cells = [
            _draw(wording, haystack, (length, depth, index), chat=chat)
            for depth, index in product(depths, range(trials))
        ]
        size = _fitting(haystack, cuts, cells, (length - answer, context), count)
        for cell in cells:
            yield cell.trial(haystack[:size])


def _cuts(text: str) -> list[int]:
    """Return where a text may end: behind words, and often in what is too long for one."""
    cuts = [0]
    for end in (*(found.start() for found in _CUT.finditer(text)), len(text)):
        if end - cuts[-1] > _WORD_LONGEST:
            cuts += range(cuts[-1] + _STEP, end, _STEP)
        cuts.append(end)
    return cuts


@dataclass(frozen=True)
class _Cell:
    """A needle that is drawn, for a text of any size; place is length, depth and index."""

    place: tuple[int, float, int]
    number: str
    needle: str
    question: str
    gap: str

    @property
    def length(self) -> int:
        return self.place[0]

    def trial(self, text: str) -> Trial:
        hidden, at = hide(text.rstrip(), self.needle, self.place[1], self.gap)
        return Trial(*self.place, self.number, self.needle, hidden, self.question, at)


def _draw(wording: Wording, haystack: str, place: tuple[int, float, int], *, chat: bool) -> _Cell:
    """Draw a name and a number that the haystack lacks; the same ones for the same place."""
    length, depth, index = place
    drawn = random.Random(f"{length} {float(depth)} {index}")
    name = drawn.choice(wording.names)
    number = str(drawn.randrange(10**6, 10**7))
    while number in haystack:
        number = str(drawn.randrange(10**6, 10**7))
    return _Cell(
        place,
        number,
        wording.needle.format(name=name, number=number),
        (wording.question if chat else wording.lead).format(name=name),
        wording.gap,
    )


def _fitting(
    haystack: str,
    cuts: Sequence[int],
    cells: Sequence[_Cell],
    rooms: tuple[int, int],
    count: Callable[[str, str], int],
) -> int:
    """Return how many characters of the haystack fit into a context, whatever the needle.

    `rooms` are the tokens without the answer, and the model's context.
    """
    room, context = rooms

    def tokens(cut: int, *asked: _Cell) -> int:
        tried = [cell.trial(haystack[: cuts[cut]]) for cell in asked or cells[:1]]
        return max(count(trial.text, trial.question) for trial in tried)

    length, least = cells[0].length, tokens(0, *cells)
    if room < least + _SLACK:
        needed = length - room + least + 2 * _SLACK
        cure = f"give at least {needed}"
        if needed > context:
            cure = (
                f"{needed} tokens are needed, but the model's context has {context}; a smaller "
                "--max_answer_tokens leaves more of it"
            )
        raise UserError(
            f"context_lengths={length} holds no text: needle and question take {least} tokens, "
            f"the answer {length - room}; {cure}"
        )
    low, high = 0, len(cuts)
    if (whole := tokens(high - 1)) < room - _SLACK:
        raise UserError(
            f"context_lengths={length} exceeds the text, which comes to {whole + length - room} "
            "tokens with needle, question and answer; give more text as --data_file, or at most "
            "so many"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle)
    while low and tokens(low, *cells) > room:  # other needles may take a few tokens more
        low -= 1
    return cuts[low]


def is_found(answer: str, number: str) -> bool:
    """Whether an answer has the number, grouped by commas or not."""
    plain = re.sub(r"(?<=\d),(?=\d)", "", answer)
    return re.search(rf"(?<!\d){number}(?!\d)", plain) is not None
