"""From an answer's Markdown to HTML that is safe to show, also while the answer grows.

HTML in an answer is text. What is written here comes from this module alone: no element that
loads, submits or runs something, no style, and links to the web and to mail only.
"""

import html
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from llm.serving.page.formulas import use_math

_LONGEST = 400_000  # characters; what is longer is shown as it came
_LONGEST_CODE = 20_000  # characters that are coloured
_SCHEMES = ("http://", "https://", "mailto:")
_FORMATTER = HtmlFormatter(nowrap=True)


def code_styles() -> str:
    """Return the style sheet of coloured code, on light and on dark ground."""
    light, dark = HtmlFormatter(style="default"), HtmlFormatter(style="github-dark")
    rules = [light.get_style_defs(".code"), dark.get_style_defs('[data-theme="dark"] .code')]
    # The page has grounds of its own.
    return "\n".join(
        rule for text in rules for rule in text.splitlines() if "background" not in rule
    )


def render(text: str) -> list[str]:
    """Return the HTML of each block (paragraph, list, code …) of a whole answer."""
    return [block for _, block in _blocks(_normal(text), {})]


class GrowingAnswer:
    """The HTML of an answer that comes in pieces; each piece costs what it changed.

    Args:
        text: what there is already.
    """

    def __init__(self, text: str = "") -> None:
        self._text = text
        self._rest = _normal(text)  # from the first block that may still change
        self._done: list[str] = []
        self._open: list[str] = []
        self._env: dict[str, Any] = {}

    @property
    def text(self) -> str:
        """What has come."""
        return self._text

    def push(self, piece: str) -> tuple[int, list[str]]:
        """Add a piece; return the number of the first block that changed, and it and the later."""
        self._text += piece
        self._rest += _normal(piece)
        blocks = _blocks(self._rest, self._env)
        first, self._open = len(self._done), [block for _, block in blocks]
        if len(blocks) > 1 and not _in_formula(self._rest):
            lines = self._rest.split("\n")
            self._rest = "\n".join(lines[blocks[-1][0] :])
            self._done += self._open[:-1]
            shown, self._open = self._open, self._open[-1:]
            return first, shown
        return first, self._open

    def finish(self) -> tuple[int, list[str]]:
        """Return what the whole text changes: a link's address may stand below the link."""
        shown, whole = self._done + self._open, render(self._text)
        first = 0
        while first < min(len(shown), len(whole)) and shown[first] == whole[first]:
            first += 1
        self._done, self._open, self._rest = whole, [], ""
        return first, whole[first:]


def _normal(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _in_formula(text: str) -> bool:
    """Whether a formula may be open, which takes later blocks into itself."""
    return text.count("$$") % 2 == 1 or text.count("\\[") != text.count("\\]")


def _blocks(text: str, env: dict[str, Any]) -> list[tuple[int, str]]:
    """Return first line and HTML of each block of the outermost level."""
    if len(text) > _LONGEST:
        return [(0, f'<pre class="plain">{html.escape(text)}</pre>')]
    blocks: list[tuple[int, list[Token]]] = []
    depth = 0
    for token in _MARKDOWN.parse(text, env):
        if depth == 0:
            blocks.append((token.map[0] if token.map else 0, []))
        blocks[-1][1].append(token)
        depth += token.nesting
    return [
        (line, _MARKDOWN.renderer.render(part, _MARKDOWN.options, env)) for line, part in blocks
    ]


@lru_cache(256)
def _code(text: str, language: str) -> str:
    """Return a block of code with its language and a button that copies it."""
    coloured = html.escape(text)
    if language and len(text) <= _LONGEST_CODE:
        try:
            lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
            coloured = highlight(text, lexer, _FORMATTER)
        except ClassNotFound:
            pass
    return (
        f'<div class="code"><div class="code-head"><span>{html.escape(language)}</span>'
        '<button type="button" class="copy" data-word="copy"></button></div>'
        f'<pre tabindex="0"><code>{coloured}</code></pre></div>\n'
    )


def _fence(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Mapping[str, Any],
    env: Mapping[str, Any],
) -> str:
    words = tokens[index].info.split()
    return _code(tokens[index].content, words[0] if words else "")


def _image(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Mapping[str, Any],
    env: Mapping[str, Any],
) -> str:
    """A picture is a link to it: showing it would tell its host who reads."""
    token = tokens[index]
    address = html.escape(str(token.attrGet("src")))
    name = html.escape(renderer.renderInlineAsText(token.children, options, env)) or address
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer nofollow">{name}</a>'


def _link_open(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Mapping[str, Any],
    env: Mapping[str, Any],
) -> str:
    tokens[index].attrs |= {"target": "_blank", "rel": "noopener noreferrer nofollow"}
    return renderer.renderToken(tokens, index, options, env)


def _cell_open(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Mapping[str, Any],
    env: Mapping[str, Any],
) -> str:
    """A column's side as a class: the page's policy knows no styles within elements."""
    side = str(tokens[index].attrs.pop("style", "")).removeprefix("text-align:")
    return f'<{tokens[index].tag} class="{side}">' if side else f"<{tokens[index].tag}>"


def _parser() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True})
    markdown.enable(["table", "strikethrough"])
    # Without these rules HTML is text, and comments do not vanish.
    markdown.disable(["html_block", "html_inline", "entity"])
    markdown.validateLink = lambda url: url.lower().startswith(_SCHEMES)  # type: ignore[method-assign]
    use_math(markdown)
    for name, rule in (("fence", _fence), ("code_block", _fence), ("image", _image)):
        markdown.add_render_rule(name, rule)
    markdown.add_render_rule("link_open", _link_open)
    markdown.add_render_rule("th_open", _cell_open)
    markdown.add_render_rule("td_open", _cell_open)
    return markdown


_MARKDOWN = _parser()
