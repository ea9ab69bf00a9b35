"""Chat templates: Jinja in a sandbox, as Hugging Face's tokenizers run them.

The environment matches transformers' `apply_chat_template`: immutable sandbox, block trimming,
loop controls, `raise_exception`, `strftime_now`, a plain `tojson` and the `generation` tag.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from common.errors import DataError

Message = Mapping[str, Any]

LLAMA2 = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('turns must alternate user, assistant, user, ..., with at most one '
            + 'system message before them; turn ' + loop.index|string + ' is from '
            + turn['role']) -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {%- set text = (system if loop.first else '') + turn['content'] -%}
        {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + turn['content'].strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

SIMPLE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim -}}
    {{- eos_token if message['role'] == 'assistant' else '' -}}
    {{- '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Assistant:\\n' -}}
{%- endif -%}
"""

# Stanford Alpaca's layout; a system message takes the place of the sentence at the top.
ALPACA = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set top = messages[0]['content'] | trim -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set top = 'Below is an instruction that describes a task. Write a response that '
        + 'appropriately completes the request.' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- bos_token + top + '\\n\\n' -}}
{%- for turn in turns -%}
    {%- if turn['role'] == 'user' -%}
        {{- '### Instruction:\\n' + turn['content'] | trim + '\\n\\n' -}}
    {%- elif turn['role'] == 'assistant' -%}
        {{- '### Response:\\n' + turn['content'] | trim + eos_token + '\\n\\n' -}}
    {%- else -%}
        {{- raise_exception('the template alpaca has no place for the role ' + turn['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""

# Vicuna 1.1's layout, on one line.
VICUNA = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set top = messages[0]['content'] | trim -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set top = 'A chat between a curious user and an artificial intelligence assistant. '
        + "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- bos_token + top + ' ' -}}
{%- for turn in turns -%}
    {%- if turn['role'] == 'user' -%}
        {{- 'USER: ' + turn['content'] | trim + ' ' -}}
    {%- elif turn['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' + turn['content'] | trim + eos_token -}}
    {%- else -%}
        {{- raise_exception('the template vicuna has no place for the role ' + turn['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""

# OpenAI's layout. Its marks have to be control tokens of the vocabulary, <|im_end|> an EOS.
CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Prompt and answer with nothing between, as PaddleNLP trains on {src, tgt}.
PLAIN = """\
{{- bos_token -}}
{%- for turn in messages -%}
    {%- if turn['role'] == 'user' -%}
        {{- turn['content'] -}}
    {%- elif turn['role'] == 'assistant' -%}
        {{- turn['content'] + eos_token -}}
    {%- else -%}
        {{- raise_exception('the template plain has no place for the role ' + turn['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""

BUILT_IN = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "simple": SIMPLE,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
    "chatml": CHATML,
    "plain": PLAIN,
}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words in some templates; the text is unchanged."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares the attribute so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; prompts want plain JSON.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        message = f"the chat template is not valid Jinja, line {error.lineno}: {error}"
        raise DataError(message) from error


# A template is a program of its own: what it may run into.
_THROWN = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


def render(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    """The conversation as text.

    Raises:
        DataError: malformed messages, a template that does not compile or refuses them.
    """
    check_messages(messages)
    compiled = _compile(template)
    try:
        return compiled.render(messages=messages, **variables)
    except _THROWN as error:
        said = f"the chat template refuses these messages: {error or type(error).__name__}"
        empty = [n for n, one in enumerate(messages, 1) if one.get("content") is None]
        if isinstance(error, TypeError) and empty:
            said += f"; turn {empty[0]} has no content, and this template takes text alone"
        raise DataError(said) from error


# Stands where a message's text ends; the space tells whether the template trims its end.
_OPEN = "\U000ffffd "


def render_open(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    """The conversation as text, up to the end of its last message's text, which goes on.

    As transformers' `continue_final_message`: what the template writes behind a message is left
    out, and so is white space at the text's end where the template trims it.

    Raises:
        DataError: see `render`; a last message without text, or a template that leaves it out.
    """
    check_messages(messages)
    last = messages[-1]
    if not isinstance(last.get("content"), str):
        raise DataError("the last message has no text that could be continued")
    text = render(
        template, [*messages[:-1], {**last, "content": last["content"] + _OPEN}], variables
    )
    end = text.rfind(_OPEN[0])
    if end < 0:
        raise DataError("the chat template leaves out the last message, so it cannot be continued")
    return text[:end] if text.startswith(_OPEN, end) else text[:end].rstrip()


def variables_of(template: str) -> frozenset[str]:
    """Names that a template uses and does not set itself.

    Raises:
        DataError: it is not valid Jinja.
    """
    parsed = _compile(template).environment.parse(template)
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))


def check_messages(messages: Sequence[Message]) -> None:
    """`DataError` unless `messages` is a list of {"role": str, "content": ...}."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise DataError(
            'messages must be a list such as [{"role": "user", "content": "Hello"}], not '
            f"{type(messages).__name__}"
        )
    if not messages:
        raise DataError("messages is empty: a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"messages[{index}] must be an object, not {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise DataError(f'messages[{index}] needs a "role" (a string), got {dict(message)!r}')
        if not isinstance(message.get("content"), str | list) and "tool_calls" not in message:
            raise DataError(
                f'messages[{index}] needs a "content" (a string), got '
                f"{type(message.get('content')).__name__}"
            )


def seal(messages: Sequence[Any], pattern: re.Pattern[str] | None) -> tuple[Any, str]:
    """Break up the texts of control tokens inside messages, or other values, with a mark found
    nowhere in them.

    A template can then be rendered and searched for control tokens, and only its own are
    found. Returns the changed messages and the mark, for `unseal`.
    """
    if pattern is None:
        return messages, ""
    content = json.dumps(messages, ensure_ascii=False, default=str)
    mark = next(c for c in map(chr, range(0xF0000, 0xFFFFD)) if c not in content)

    def broken(match: re.Match[str]) -> str:
        return mark.join(match.group())

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(broken, value)
        if isinstance(value, Mapping):
            return {walk(key): walk(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [walk(item) for item in value]
        return value

    return walk(messages), mark


def unseal(text: str, mark: str) -> str:
    """`text` without the mark that `seal` put in, also where a template wrote JSON of it."""
    return text.replace(mark, "").replace(json.dumps(mark)[1:-1], "") if mark else text
