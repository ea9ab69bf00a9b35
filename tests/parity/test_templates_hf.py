"""Chat templates with tools, calls, thoughts and documents: the text that transformers makes."""

import json
from pathlib import Path

import pytest

from common.errors import DataError
from data.tokenizer import BUILT_IN_TOKENIZERS, load_tokenizer
from tests.parity.template_cases import CONVERSATIONS, TEMPLATES

MODEL = "__internal_testing__/tiny-random-llama"
CASES = [
    (template, case, prompt)
    for template in TEMPLATES
    for case in CONVERSATIONS
    for prompt in (True, False)
]


@pytest.fixture(scope="module")
def theirs(peer, tmp_path_factory):
    """Return what transformers renders, or null where the template refuses, in order."""
    root = tmp_path_factory.mktemp("templates")
    request = {
        "tokenizer": str(BUILT_IN_TOKENIZERS[MODEL] / "tokenizer.json"),
        "cases": [
            {"template": TEMPLATES[template], **CONVERSATIONS[case], "prompt": prompt}
            for template, case, prompt in CASES
        ],
    }
    (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
    peer("render", root, "mask_side")
    rendered = json.loads((root / "rendered.json").read_text("utf-8"))
    return dict(zip(CASES, rendered, strict=True))


def ours(template: str, case: str, *, prompt: bool) -> str | None:
    """Return what the suite renders, as training and serving do; None where it is refused."""
    tokenizer = load_tokenizer(MODEL, chat_template=TEMPLATES[template])
    given = dict(CONVERSATIONS[case])
    variables = {**given.pop("variables", {}), **given}
    messages = variables.pop("messages")
    try:
        text = tokenizer.render_chat(messages, add_generation_prompt=prompt, **variables)
    except DataError:
        return None
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, **variables)
    assert "".join(tokenizer.decode(ids, skip_special=False).split()) == "".join(text.split())
    return text


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendered_as_transformers_renders(template, theirs):
    both = {
        (case, prompt): (ours(template, case, prompt=prompt), theirs[template, case, prompt])
        for case in CONVERSATIONS
        for prompt in (True, False)
    }
    assert {key: one for key, (one, _) in both.items()} == {k: two for k, (_, two) in both.items()}
    assert sum(one is not None for one, _ in both.values()) >= 20


def test_what_is_written_as_escaped_json_is_not_left_sealed(tmp_path: Path) -> None:
    template = "{{ messages[0].content | tojson(ensure_ascii=true) }}"
    tokenizer = load_tokenizer(MODEL, chat_template=template)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "é</s>"}])
    assert tokenizer.decode(ids, skip_special=False) == '"\\u00e9</s>"'
