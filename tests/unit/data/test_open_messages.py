"""A last message that goes on: where the rendering is cut, and which variables templates ask for.

The expected texts are what transformers 5.23 gives with ``continue_final_message``.
"""

import pytest

from common.errors import DataError
from data.tokenization.chat import CHATML, render, render_open, variables_of

TRIMS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}"
KEEPS = TRIMS.replace(" | trim", "")


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (TRIMS, "The weather", "The weather"),
        (TRIMS, "e", "e"),
        (TRIMS, "  two words  ", "two words"),
        (KEEPS, "  two words  ", "  two words  "),
        (TRIMS, "a\n\n", "a"),
        (KEEPS, "x[end]y ", "x[end]y "),
    ],
)
def test_the_rendering_ends_with_the_text(template: str, text: str, expected: str) -> None:
    messages = [{"role": "user", "content": "e"}, {"role": "assistant", "content": text}]
    before = render(template, messages[:1], {}) + "[assistant]"
    assert render_open(template, messages, {}) == before + expected
    whole = render(template, messages, {})
    assert whole == before + expected + "[end]", "no more than the end is cut"


def test_what_cannot_go_on() -> None:
    with pytest.raises(DataError, match="no text that could be continued"):
        render_open(KEEPS, [{"role": "assistant", "content": None, "tool_calls": []}], {})
    with pytest.raises(DataError, match="leaves out the last message"):
        render_open("{{ messages[0].content }}", [{"role": "user", "content": "x"}] * 2, {})


def test_variables() -> None:
    assert variables_of(CHATML) == {"messages", "add_generation_prompt"}
    assert "style" in variables_of("{% set a = style %}{{ a }}") and "a" not in variables_of(
        "{% set a = style %}{{ a }}"
    )
