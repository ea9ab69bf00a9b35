"""LaTeX in answers: finding it in Markdown, between any of the four pairs of delimiters, and
turning it into MathML, which browsers draw themselves."""

import html
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

# What opens, what closes, and whether the formula stands on a line of its own. The longer first.
_PAIRS = (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
_LONGEST = 4000  # characters: no formula is longer, and converting takes time
# Presentation elements of MathML Core and the attributes by which formulas differ. The converter
# passes on what `\href`, `\style` and `\text` are given; nothing of that may reach a browser.
_TAGS = """
    math mrow mi mn mo mtext mspace mfrac msqrt mroot mstyle mpadded mphantom msub msup msubsup
    munder mover munderover mmultiscripts mprescripts mtable mtr mtd menclose
"""
_ATTRIBUTES = """
    display mathvariant stretchy fence form separator lspace rspace width accent minsize maxsize
    linethickness columnalign columnspacing rowspacing movablelimits displaystyle scriptlevel
    columnlines rowlines notation largeop symmetric
"""
_ALLOWED_TAGS = frozenset(_TAGS.split())
_ALLOWED_ATTRIBUTES = frozenset(_ATTRIBUTES.split())


def use_math(markdown: MarkdownIt) -> None:
    """Teach a parser the four pairs: ``$ $``, ``$$ $$``, ``\\( \\)`` and ``\\[ \\]``."""
    starts = ["paragraph", "reference", "blockquote", "list"]
    markdown.block.ruler.before("fence", "math_block", _block, {"alt": starts})
    markdown.inline.ruler.before("escape", "math", _inline)
    markdown.add_render_rule("math", _render)
    markdown.add_render_rule("math_block", _render)


@lru_cache(512)
def mathml(latex: str, on_its_own: bool) -> str:
    """Return MathML of a formula; its source as code where the converter knows no way."""
    source = f"<code>{html.escape(latex)}</code>"
    if len(latex) > _LONGEST:
        return source
    try:
        root = convert_to_element(latex, display="block" if on_its_own else "inline")
    except Exception:  # noqa: BLE001 - other people's code, on what a model wrote
        return source
    parts = list(root.iter())
    if any(part.tag not in _ALLOWED_TAGS for part in parts):
        return source
    for part in parts:
        kept = {name: value for name, value in part.attrib.items() if name in _ALLOWED_ATTRIBUTES}
        part.attrib.clear()
        part.attrib.update(kept)
        # The converter writes its symbols as character references.
        part.text, part.tail = html.unescape(part.text or ""), html.unescape(part.tail or "")
    return ElementTree.tostring(root, encoding="unicode")


def _block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A formula that begins a line and ends one, whatever Markdown would read between."""
    found = None if state.is_code_block(start) else _lines_of_formula(state, start, end)
    if found is None:
        return False
    if not silent:
        token = state.push("math_block", "math", 0)
        token.content, last = found
        token.block, token.map = True, [start, last + 1]
        state.line = last + 1
    return True


def _lines_of_formula(state: StateBlock, start: int, end: int) -> tuple[str, int] | None:
    """Return the LaTeX and the last line of a formula that begins a line."""
    begin = state.bMarks[start] + state.tShift[start]
    pairs = (pair for pair in _PAIRS if pair[2] and state.src.startswith(pair[0], begin))
    opening, closing, _ = next(pairs, ("", "", False))
    begin += len(opening)
    if not opening or state.src.find(closing, begin, begin + _LONGEST) < 0:
        return None
    rest, last, lines = state.src[begin : state.eMarks[start]], start, []
    while not rest.rstrip().endswith(closing):
        lines.append(rest)
        last += 1
        if closing in rest or last >= end or state.sCount[last] < state.blkIndent:
            return None
        rest = state.getLines(last, last + 1, state.blkIndent, False)
    latex = "\n".join([*lines, rest.rstrip()[: -len(closing)]]).strip()
    return (latex, last) if latex and closing not in latex else None


def _inline(state: StateInline, silent: bool) -> bool:
    """A formula within a paragraph."""
    if state.src[state.pos] not in "$\\":
        return False
    found = next((pair for pair in _PAIRS if state.src.startswith(pair[0], state.pos)), None)
    if found is None:
        return False
    opening, closing, on_its_own = found
    begin = state.pos + len(opening)
    end = state.src.find(closing, begin, begin + _LONGEST)
    if end < 0 or not state.src[begin:end].strip():
        return False
    if opening == "$" and not _is_formula(state.src, begin, end):
        return False
    if not silent:
        token = state.push("math", "math", 0)
        token.content, token.meta = state.src[begin:end], {"on_its_own": on_its_own}
    state.pos = end + len(closing)
    return True


def _is_formula(text: str, begin: int, end: int) -> bool:
    """Whether single dollars are delimiters and no prices, by Pandoc's rule."""
    return not (
        text[begin].isspace()
        or text[end - 1].isspace()
        or "\n\n" in text[begin:end]
        or text[end + 1 : end + 2].isdigit()
        or (begin > 1 and text[begin - 2].isdigit())
    )


def _render(
    renderer: RendererHTML,
    tokens: Sequence[Any],
    index: int,
    options: Mapping[str, Any],
    env: Mapping[str, Any],
) -> str:
    token = tokens[index]
    on_its_own = token.block or bool(token.meta.get("on_its_own"))
    formula = mathml(token.content.strip(), on_its_own)
    return f'<div class="formula">{formula}</div>\n' if token.block else formula
