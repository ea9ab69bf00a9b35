"""Calls of tools: read from answers however cut, and written where templates have no place."""

import json
import random
from typing import Any

import pytest
from fakes import FakeTokenizer, MakeClient, make_served
from test_serving_api import USER, chat, sse

from data.tokenization.chat import BUILT_IN, render
from llm.serving.tools.dialect import Dialect, dialect_of, with_tools, write_calls
from llm.serving.tools.parsers import PARSERS, Part
from llm.serving.tools.schema import Tool
from llm.serving.tools.stream import gather

NAMES = ("get_weather", "get_weather_now", "f", "a.b-c")
TOOLS = [{"type": "function", "function": {"name": name}} for name in NAMES]
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"city": "Paris"},
    {"city": 'quo"te\\ {[<tool_call>]} \n 中 😀', "n": -1.5e3, "deep": [{"a": [True, None, "]"]}]},
]
# Answers without calls, which have to come out as they are, whatever reads them.
TEXTS = [
    "",
    "hello",
    " \n hello {",
    '{"answer": 42}',
    '{"name": "Alice", "age": 3}',
    "[1, 2, 3]",
    "[f, g]",
    '{"name": "f"',
    "<tool_call>\nnothing</tool_call> more",
    "a <tool_cal",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    "f(x=1)",
]


def read(parser: str, text: str, rng: random.Random | None = None) -> tuple[str, list[Any]]:
    """Return text and calls, of the answer whole or cut at random."""
    reader, parts, position = PARSERS[parser](NAMES), list[Part](), 0
    while position < len(text) and rng is not None:
        size = rng.randint(0, 6)
        parts += reader.push(text[position : position + size])
        position += size
    parts += reader.push("" if rng else text, last=True)
    shown, calls = gather(parts)
    return shown, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("seed", range(30))
def test_calls_that_are_written_are_read(parser: str, seed: int) -> None:
    rng = random.Random(seed)
    calls = [(rng.choice(NAMES), rng.choice(ARGUMENTS)) for _ in range(rng.randint(1, 3))]
    text = write_calls(parser, calls) + rng.choice(["", "\n", " "])
    before = rng.choice(["", "Let me see.\n\n"]) if parser == "hermes" else ""
    for how in (None, *(random.Random(seed + n) for n in range(4))):
        assert read(parser, before + text, how) == (before.rstrip(), calls)


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_call_is_text(parser: str, text: str) -> None:
    for how in (None, *map(random.Random, range(6))):
        assert read(parser, text, how) == (text, [])


@pytest.mark.parametrize(
    ("parser", "text", "shown", "calls"),
    [
        ("hermes", '<tool_call>[{"name":"f","arguments":{"x":1}},{"name":"f"}]</tool_call>', "", 2),
        ("hermes", '<tool_call>\n{"arguments": {"x": 1}, "name": "f"}\n</tool_call> ok', " ok", 1),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", 1),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', "", 1),
        ("llama3_json", '{"type": "function", "name": "f", "parameters": {"x": 1}}', "", 1),
        ("llama3_json", '{"parameters": {"x": 1}, "name": "f"}', "", 1),
        ("llama3_json", "<|python_tag|>print(1)", "print(1)", 0),
        ("pythonic", "<|python_tag|>[f(x=1)]", "", 1),
        ("pythonic", "[f(x=true, y=None, z=u'a')]", "", 1),
        ("pythonic", "[f( x = 1 , )]", "", 1),
    ],
)
def test_how_models_write_them_too(parser: str, text: str, shown: str, calls: int) -> None:
    for how in (None, *map(random.Random, range(6))):
        found = read(parser, text, how)
        assert found[0] == shown and len(found[1]) == calls
        if calls:
            assert found[1][0][0] == "f" and found[1][0][1]["x"] in (1, True)


@pytest.mark.parametrize("template", [name for name in BUILT_IN if name != "plain"])
def test_templates_without_a_place_for_tools(template: str) -> None:
    """All that is said of tools stands in the prompt, in turns that the template takes."""
    tokenizer = FakeTokenizer(chat_template=BUILT_IN[template])
    tokenizer.render_chat = lambda messages, tools=None: render(  # type: ignore[method-assign]
        BUILT_IN[template], messages, variables | {"tools": tools}
    )
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    dialect = dialect_of(tokenizer)
    assert not dialect.takes_tools and not dialect.takes_calls
    assert dialect.parser == ("llama3_json" if template == "llama3" else "hermes")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "four", "tool_call_id": "1"},
        {"role": "tool", "content": "five", "tool_call_id": "1"},
    ]
    found, extra = with_tools(messages, TOOLS, dialect)
    text = render(BUILT_IN[template], found, variables | extra)
    assert all(name in text for name in NAMES) and "None" not in text
    assert write_calls(dialect.parser, [("f", {"x": 1})] * 2)[:20] in text
    assert text.index("four") < text.index("five")


def test_a_template_that_takes_all_gets_all() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "four", "tool_call_id": "1"},
    ]
    found, extra = with_tools(messages, TOOLS, Dialect("hermes", True, True, True))
    assert extra == {"tools": TOOLS}
    assert found == [messages[0], {**messages[1], "name": "f"}]


def test_templates_read_the_parameters_of_a_function_without_any() -> None:
    """As those of Hermes do: they would stop at what is not there."""
    listed = "{{ f.name }}{{ f.parameters.properties.items() | list }}"
    template = f"{{% for t in tools %}}{{% set f = t.function %}}{listed}{{% endfor %}}"
    template += "{{ messages[0].content }}"
    tokenizer = FakeTokenizer(chat_template=template)
    tokenizer.render_chat = lambda messages, tools=None, **_: render(  # type: ignore[method-assign]
        template, messages, {"tools": tools}
    )
    for function in ({"name": "now"}, {"name": "now", "parameters": {"type": "object"}}):
        tool = Tool.model_validate({"type": "function", "function": function})
        found, extra = with_tools(USER, [tool.as_template_tool()], dialect_of(tokenizer))
        assert extra and tokenizer.render_chat(found, **extra).startswith("now[]")


@pytest.mark.parametrize(
    ("shown", "kept"),
    [("{{ m.content }}", ""), ("{% if m.content %}{{ m.content }}{% endif %}", None)],
)
def test_null_beside_calls_is_empty_where_a_template_would_write_none(
    shown: str, kept: str | None
) -> None:
    """As in training, null stays null where the template takes it."""
    calls = "{{ m.tool_calls | default('') | tojson }}"
    template = f"{{% for m in messages %}}{shown}{calls}{{% endfor %}}"
    tokenizer = FakeTokenizer(chat_template=template)
    tokenizer.render_chat = lambda messages, tools=None: render(  # type: ignore[method-assign]
        template, messages, {"tools": tools}
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    dialect = dialect_of(tokenizer)
    assert dialect.takes_calls
    assert with_tools([message], (), dialect)[0][0]["content"] == kept


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "yes"}}\n</tool_call>'


def test_calls_in_whole_answers(make_client: MakeClient) -> None:
    client = make_client(make_served(f"well\n{CALL}\n{CALL}", max_model_len=900), src_length=700)
    choice = chat(client, tools=TOOLS, max_tokens=None, n=2)["choices"][1]
    assert choice["finish_reason"] == "length", "the limit of 50 tokens cuts the first call"
    client = make_client(
        make_served(f"{CALL}\n{CALL}", FakeTokenizer((CALL,)), max_model_len=900), src_length=700
    )
    choice = chat(client, tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": "yes"}'}
    plain = chat(client, tools=TOOLS, tool_choice="none")["choices"][0]
    assert plain["message"]["content"] == f"{CALL}\n{CALL}" and plain["finish_reason"] == "stop"


def test_calls_in_streams(make_client: MakeClient) -> None:
    """Arguments come as they grow; joined they are those of the whole answer."""
    served = make_served(f"well {CALL}", FakeTokenizer(("<tool_call>\n", "arg")), max_model_len=900)
    client = make_client(served, src_length=700, max_length=90)
    body = {"messages": USER, "tools": TOOLS, "stream": True, "logprobs": True}
    *events, _ = sse(client.post("/v1/chat/completions", json=body))
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["id"].startswith("call_") and calls[0]["function"]["name"] == "f"
    assert {call["index"] for call in calls} == {0} and len(calls) > 5
    assert "".join(call["function"]["arguments"] for call in calls) == '{"x": "yes"}'
    assert "".join(delta.get("content", "") for delta in deltas) == "well"
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    told = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    assert sum(len(one["content"]) for one in told) == len(served.engine.answer)
