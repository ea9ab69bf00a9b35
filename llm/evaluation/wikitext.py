"""WikiText as running text: the rules by which lm-evaluation-harness undoes its tokenization.

Perplexities per word are only comparable between tokenizers when the text is, so these are the
rules of ``lm_eval/tasks/wikitext/preprocess_wikitext.py``, in its order.
"""

import re
from collections.abc import Callable

# Plain replacements before and after quotes and brackets are closed up.
_SPACED_MARKS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_PUNCTUATION = tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def _closing(start: str, end: str) -> Callable[[str], str]:
    """Return a function that drops the blanks just inside each pair of marks."""
    opened, closed, inner = re.escape(start), re.escape(end), re.escape(end)
    pattern = re.compile(rf"{opened}\s*([^{inner}]*?)\s*{closed}")
    return lambda text: pattern.sub(lambda match: f"{start}{match[1]}{end}", text)


_PAIRS = tuple(_closing(start, end) for start, end in ("()", "[]", "{}", '""', "''"))


def detokenize(text: str) -> str:
    """Return a WikiText page as running text.

    The harness also has a rule between slashes that rewrites a match as its own pattern; such text
    does not occur in WikiText, and the rule is left out.
    """
    text = text.replace("s '", "s'")
    for old, new in (*_SPACED_MARKS, *_PUNCTUATION):
        text = text.replace(old, new)
    for close_up in _PAIRS:
        text = close_up(text)
    for old, new in _REST:
        text = text.replace(old, new)
    return text


def count_words(text: str) -> int:
    """Return the number of words that the harness divides by: pieces between runs of white space.

    Text that begins or ends with white space has an empty piece there, which counts.
    """
    return len(re.split(r"\s+", text))
