"""Records, and a template that has a place for all that they hold."""

import json
from pathlib import Path
from typing import Any

# With a place for everything, as the templates of instruct models have.
TOOLS = """\
{{- bos_token -}}
{%- if tools -%}{{ 'tools: ' + tools | tojson + '\\n' }}{%- endif -%}
{%- for m in messages -%}
    {{- m.role + ': ' -}}
    {%- if m.reasoning_content -%}{{ '(' + m.reasoning_content + ') ' }}{%- endif -%}
    {%- if m.content is not none -%}{{ m.content | trim }}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
        {{- ' call ' + call.function.name + ' ' + call.function.arguments | tojson -}}
    {%- endfor -%}
    {{- eos_token if m.role == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}
"""
W = {"type": "function", "function": {"name": "weather", "description": "tells it"}}
CALL = {"function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
ASK = {"role": "user", "content": "weather?"}
RAIN = {"role": "tool", "content": "rain"}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SIMPLE = [{"role": "user", "content": "q"}, answer("a")]
