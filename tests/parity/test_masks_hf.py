"""Ids and label masks of conversations against transformers' assistant masks."""

import json

import pytest
import tokenizers

from data.conversations.instruct import Example, read_examples
from data.conversations.instruct_dataset import InstructDataset
from data.conversations.tasks import find_task
from data.tokenization.chat import BUILT_IN, render
from data.tokenizer import BUILT_IN_TOKENIZERS, load_tokenizer

# The built-in templates, with what is learnt marked for transformers.
MARKED = {
    "simple": """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '### ' + message['role'] | capitalize + ':\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] | trim + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] | trim -}}
    {%- endif -%}
    {{- '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
""",
    "alpaca": """\
{%- if messages[0]['role'] == 'system' -%}
    {{- bos_token + messages[0]['content'] + '\\n\\n' -}}
{%- else -%}
    {{- bos_token + 'Below is an instruction that describes a task. Write a response that ' -}}
    {{- 'appropriately completes the request.\\n\\n' -}}
{%- endif -%}
{%- for message in messages if message['role'] != 'system' -%}
    {%- if message['role'] == 'user' -%}
        {{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' -}}
    {%- else -%}
        {{- '### Response:\\n' -}}
        {%- generation -%}{{- message['content'] | trim + eos_token -}}{%- endgeneration -%}
        {{- '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
""",
    "chatml": """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
}


def _conversations() -> list[list[dict[str, str]]]:
    files = find_task("alpaca")
    found = [list(example.messages) for example in read_examples([*files.train, *files.dev])]
    several = [turn for messages in found[:4] for turn in messages]
    odd = [
        {"role": "user", "content": "Zeig mir\n\nZeilen  und 漢字 🦙"},
        {"role": "assistant", "content": "- eins\n- zwei\n\n漢字 🦙 \t."},
    ]
    return [*found, several, [{"role": "system", "content": "Be brief."}, *several], odd]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return directories with a tokenizer.json: the built-in one, and one with ChatML's marks."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((m["content"] for c in _conversations() for m in c), trainer)
    directory = tmp_path_factory.mktemp("chatml")
    model.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    built_in = BUILT_IN_TOKENIZERS["__internal_testing__/tiny-random-llama"]
    return {"simple": built_in, "alpaca": built_in, "chatml": directory}


@pytest.fixture(scope="module")
def theirs(peer, models, tmp_path_factory):
    """Return transformers' ids and masks by template."""
    root = tmp_path_factory.mktemp("masks")
    request = []
    for template, directory in models.items():
        tokenizer = load_tokenizer(directory)
        texts = tokenizer.chat_variables(add_generation_prompt=False)
        request.append(
            {
                "tokenizer": str(directory / "tokenizer.json"),
                "bos": texts["bos_token"] or None,
                "eos": texts["eos_token"],
                "template": MARKED[template],
                "conversations": _conversations(),
            }
        )
    (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
    peer("masks", root, "mask_side")
    return dict(zip(models, json.loads((root / "masks.json").read_text("utf-8")), strict=True))


@pytest.mark.parametrize("template", MARKED)
def test_the_marked_template_is_the_built_in_one(template):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for messages in _conversations():
        for prompt in (True, False):
            variables = {**tokens, "add_generation_prompt": prompt}
            assert render(MARKED[template], messages, variables) == render(
                BUILT_IN[template], messages, variables
            )


@pytest.mark.parametrize("template", MARKED)
def test_ids_and_masks(template, theirs, models):
    tokenizer = load_tokenizer(models[template], chat_template=template)
    examples = [
        Example(tuple(messages), (messages[-1]["content"],), str(number))
        for number, messages in enumerate(_conversations())
    ]
    dataset = InstructDataset.from_examples(examples, tokenizer)
    assert len(theirs[template]) == len(dataset)
    for number, expected in enumerate(theirs[template]):
        ids, mask = dataset.document(number)
        # Nothing follows the last label here; there, the line break after the turn does.
        assert ids.tolist() == expected["ids"][: len(ids)]
        assert mask.tolist() == [bool(flag) for flag in expected["mask"][: len(ids)]]
        assert not any(expected["mask"][len(ids) :])
