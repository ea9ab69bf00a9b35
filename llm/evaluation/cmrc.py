"""Exact match and F1 of Chinese answers, as CMRC 2018's evaluation defines them.

Cui et al. 2019, "A Span-Extraction Dataset for Chinese Machine Reading Comprehension", and its
``cmrc2018_evaluate.py``: Chinese characters count one by one, other words whole (mixed
segmentation), and what two answers share is their longest common run of segments.
"""

import re
from collections.abc import Sequence

from llm.evaluation.squad import Measure

# What the script drops; it lists "……" as one, so that a single … stays.
_DROPPED = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CHINESE = re.compile("([\u4e00-\u9fa5])")
# Where words of other scripts end, as NLTK's word_tokenize has it, which the script calls.
_MARK = re.compile(r"(\.{2,}|[;@#$%&?!()\[\]{}<>]|,(?!\d))")
# It tells quotation marks that open from those that close.
_OPENING = re.compile(r'(?<=[ (\[{<])"')
_CONTRACTION = re.compile(r"(?<=\S)(n't|'(?:s|m|d|ll|re|ve))(?=\s|$)")
_FULL_STOP = re.compile(r"(?<=[^.])\.(?=[\])}>\"'»” ]*\s*$)")


def _plain(text: str) -> str:
    return text.lower().strip().translate(_DROPPED)


def segments(text: str) -> list[str]:
    """Return the segments of an answer in lower case: Chinese characters, and other words."""
    found: list[str] = []
    for piece in _CHINESE.split(_plain(text)):
        opened = _OPENING.sub("`` ", re.sub('^"', "`` ", piece))
        apart = _MARK.sub(r" \1 ", _FULL_STOP.sub(" .", opened)).replace('"', " '' ")
        found += _CONTRACTION.sub(r" \1", apart).split()
    return found


def _longest_common_run(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest run of segments that is in both."""
    longest = 0
    before = [0] * (len(other) + 1)  # of runs that end at the segment before and at each of other
    for segment in one:
        lengths = [0]
        for number, candidate in enumerate(other):
            lengths.append(before[number] + 1 if segment == candidate else 0)
        longest = max(longest, *lengths)
        before = lengths
    return longest


CMRC = Measure(_plain, segments, _longest_common_run)
