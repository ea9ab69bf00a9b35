"""Answers as HTML: no element or address but those named here, and the same HTML in pieces."""

import random
from html.parser import HTMLParser

import pytest

from llm.serving.page.rendering import GrowingAnswer, code_styles, render

_TAGS = """
    p br strong em s code pre div span button ul ol li blockquote table thead tbody tr th td hr
    h1 h2 h3 h4 h5 h6 a math mrow mi mn mo mtext mspace mfrac msqrt mroot mstyle msub msup
    msubsup munder mover munderover mtable mtr mtd mpadded mphantom menclose
"""
_ATTRIBUTES = """
    class href title target rel type data-word tabindex start display mathvariant stretchy fence
    form separator lspace rspace width accent minsize maxsize linethickness columnalign
    columnspacing rowspacing movablelimits displaystyle scriptlevel columnlines rowlines
    notation largeop symmetric
"""
TAGS, ATTRIBUTES = set(_TAGS.split()), set(_ATTRIBUTES.split())
CLASSES = {"code", "code-head", "copy", "formula", "plain", "center", "left", "right"}


class Shown(HTMLParser):
    """What a browser would make of HTML: elements, addresses, classes and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: dict[str, list[str]] = {}
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags.add("a comment")

    def handle_decl(self, decl: str) -> None:
        self.tags.add("a declaration")

    unknown_decl = handle_decl
    handle_pi = handle_decl


def shown(text: str) -> Shown:
    return Shown("".join(render(text)))


HOSTILE = [
    "<style>body{display:none}</style>",
    "<script>document.title='owned'</script>",
    '<div style="position:fixed;inset:0;background:red">over all</div>',
    '<form action="https://example.com"><input name="key"><button>Log in</button></form>',
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) <javascript:alert(1)>",
    "[c](data:text/html;base64,PHN2Zz4=) [d](vbscript:x) [e](file:///etc/passwd) [f](//host/x)",
    "[g](/answer) [h](relative) [i](&#106;avascript:alert(1)) [j](java\tscript:alert(1))",
    '![x](https://example.com/x.png) ![y](javascript:alert(1)) !["><b>](https://e.org/"><b>)',
    "<!-- not shown? --> <!DOCTYPE html> <?php ?> <![CDATA[ x ]]>",
    '[t](https://e.org "\\"><script>alert(1)</script>")',
    '```"><script>alert(1)</script>\nx\n```',
    "```html\n<script>alert(1)</script>\n```",
    "`<img src=x onerror=alert(1)>`",
    r"$\text{<script>alert(1)</script>}$ $\text{&lt;script&gt;}$ \(\href{javascript:alert(1)}{x}\)",
    r"$\style{position:fixed;inset:0}{x}$ $\class{primary}{x}$ $\cssId{stop}{x}$ $\color{red}{x}$",
    r"\[ \unicode{x3c}script\unicode{x3e} \] $\mathop{<b onload=alert(1)>}$",
    "<svg/onload=alert(1)> <iframe srcdoc=x> <a href=https://e.org>b</a> <base href=https://e.org>",
    "| a |\n|:-:|\n| <b onclick=alert(1)> |",
    "[r]: javascript:alert(1)\n\n[r]",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_acts_comes_out(text: str) -> None:
    seen = shown(text)
    assert seen.tags <= TAGS
    assert seen.attributes.keys() <= ATTRIBUTES
    for address in seen.attributes.get("href", []):
        assert address.startswith(("http://", "https://", "mailto:"))
    names = {name for value in seen.attributes.get("class", []) for name in value.split()}
    assert {name for name in names if len(name) > 3} <= CLASSES, "the page's own are out of reach"


@pytest.mark.parametrize(
    "text",
    [
        "if a<b and c>d then",
        "std::vector<int> x; List<String>",
        "<style>b</style>",
        "&lt;b&gt; &amp; &nbsp;",
        "<!-- a comment -->",
        "<think>\nhm\n</think>",
        "x < y, y > z",
    ],
)
def test_html_is_text(text: str) -> None:
    assert " ".join(shown(text).text.split()) == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "display"),
    [
        (r"so \(a^2\) is", "inline"),
        (r"so $a^2$ is", "inline"),
        (r"so \[a^2\] is", "block"),
        (r"so $$a^2$$ is", "block"),
        ("text\n\\[\na^2\n\\]\nmore", "block"),
        ("text\n$$\na^2\n$$\nmore", "block"),
        ("- item\n\n  \\[\n  a^2\n  \\]", "block"),
        ("> \\[ a^2 \\]", "block"),
    ],
)
def test_the_four_delimiters(text: str, display: str) -> None:
    seen = shown(text)
    assert seen.attributes["display"] == [display]
    assert {"msup", "mi", "mn"} <= seen.tags
    assert not set("$\\^[") & set(seen.text)


def test_lines_of_a_formula_are_no_markdown() -> None:
    seen = shown("\\[\na\n+ b\n- c\n= d\n\\]")
    assert "ul" not in seen.tags and "h1" not in seen.tags
    assert "".join(seen.text.split()) == "a+b−c=d"


@pytest.mark.parametrize(
    "text",
    ["costs $5 and $6", "`$a$`", "```\n$$a$$\n```", r"\$a\$", "$ a $", "$$", "a $$ b", r"\(", "$a"],
)
def test_what_is_no_formula_stays(text: str) -> None:
    assert "math" not in shown(text).tags


@pytest.mark.parametrize("latex", ["{", r"\begin{x}", r"\left( x", "x" * 5000])
def test_a_formula_that_nobody_can_read_is_shown_as_typed(latex: str) -> None:
    assert latex in shown(f"\\({latex}\\)").text


def test_code_keeps_every_space_and_is_coloured() -> None:
    code = "def f(x):\n\n\treturn  x  # <b>\n\n"
    seen = shown(f"```python\n{code}```")
    assert seen.text == "python" + code + "\n"
    assert "k" in seen.attributes["class"]
    assert shown(f"```nonsense\n{code}```").text == "nonsense" + code + "\n"
    assert "background" not in code_styles()


PARTS = [
    *("# Title\n\n", "a paragraph\nof lines\n\n", "- a\n- b\n\n  c\n", "1. x\n\n2. y\n\n"),
    *("```python\nx = 1\n\n\ny\n```\n", "| a | b |\n|---|---|\n| 1 | 2 |\n\n", "> q\n> r\n\n"),
    *("\\[\nx\n\n\\]\n\n", "$$\ny\n$$\n", "text\n---\n", "    code\n\n    more\n\n", "***\n"),
    *("see [link]\n\n", "[link]: https://e.org\n\n", "<div>\n\nx\n\n</div>\n", "end $$ of", "\r\n"),
]


def test_an_answer_in_pieces_ends_as_the_whole() -> None:
    chance = random.Random(7)
    for _ in range(150):
        text = "".join(chance.choices(PARTS, k=chance.randint(1, 8)))
        growing, blocks, place = GrowingAnswer(), [], 0
        while place < len(text):
            step = chance.randint(1, 12)
            first, changed = growing.push(text[place : place + step])
            blocks[first:] = changed
            place += step
        first, changed = growing.finish()
        blocks[first:] = changed
        assert blocks == render(text), text
        assert growing.text == text


def test_what_is_done_is_not_drawn_again() -> None:
    growing = GrowingAnswer()
    sizes = [len(growing.push(f"Paragraph {n} of a long answer.\n\n")[1]) for n in range(200)]
    assert max(sizes) <= 2
    assert growing.finish()[1] == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece", ["[", "*a **a ", "`", "\\(", "$a ", "![[", "\\[\n", "$$\n", "> ", "|a", "<", "- "]
)
def test_long_nonsense_is_rendered_in_time(piece: str) -> None:
    render(piece * (8000 // len(piece)))
