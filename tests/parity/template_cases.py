"""Chat templates in the manner of instruct models, and conversations that use all of them.

Written for these tests; each does with tools, calls, documents and thoughts what the templates of
a family of models do, by the same means of Jinja.
"""

from typing import Any

# Llama 3.1 and 3.2: tools in the first user's turn or the system's, a date, calls as JSON.
LLAMA31 = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if not in_user is defined %}{%- set in_user = true %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: tools\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none and not in_user %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system + "<|eot|>" }}
{%- if in_user and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("No place for tools without a first user's turn") }}
    {%- endif %}
    {{- '<|start|>user<|end|>\\n\\nAnswer with JSON for a call.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|end|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}
        {{- "<|start|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""

# Hermes: a macro for types, namespaces, tools and answers of tools within marks.
HERMES = """\
{%- macro kind(spec) -%}
    {%- if spec.type is string -%}{{- {"string": "str", "integer": "int"}[spec.type] or "Any" -}}
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{- "Union[" + spec.type | join(",") + "]" -}}
    {%- else -%}Any{%- endif -%}
{%- endmacro -%}
{{- bos_token + '<|im_start|>system\\n' }}
{%- if tools %}
    {{- 'Functions <tools>' }}
    {%- for tool in tools %}
        {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
        {{- '{"name": "' + tool.name + '", ' }}
        {{- '"description": "' + tool.name + '(' }}
        {%- for name, spec in (tool.parameters.properties or {}) | items %}
            {{- name + ": " + kind(spec) }}{%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
        {{- ")" }}{%- if tool.description %}{{- " - " + tool.description }}{%- endif %}
        {{- '", "parameters": ' + (tool.parameters or {}) | tojson(sort_keys=true) + '}' }}
    {%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{%- if documents %}
    {%- for document in documents %}
        {{- '\\n<doc ' ~ loop.index ~ '>' + document['title'] + ': ' + document.text + '</doc>' }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- set ns = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.last = loop.index0 %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" or (message.role == "assistant"
            and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}{{- message.content }}
        {%- else %}
            {%- for part in message.content %}{{- part.text if part.type == 'text' }}{%- endfor %}
        {%- endif %}
        {{- '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}
            {{- '", "arguments": ' }}{{- tool_call.arguments|tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}
            {{- '<|im_start|>tool\\n' }}
        {%- endif %}
        {{- '<tool_response>\\n' + message.content }}
        {%- if not loop.last %}{{- '\\n</tool_response>\\n' }}
        {%- else %}{{- '\\n</tool_response>' }}{%- endif %}
        {%- if loop.last or (loop.nextitem and loop.nextitem.role != "tool") %}
            {{- '<|im_end|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# ChatML of models that think: earlier thoughts are left out; every way to write JSON.
CHATML = """\
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou help.' -}}
        {{- ' ' ~ tools | length ~ ' tools' if tools else '' -}}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
    {%- if message.role == 'skip' -%}{%- continue -%}{%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.reasoning_content is defined and message.reasoning_content -%}
        {%- if loop.last -%}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '</think>\\n' -}}
        {%- endif -%}
    {%- endif -%}
    {%- generation -%}{{- message.content or '' -}}{%- endgeneration -%}
    {%- for call in message.tool_calls or [] -%}
        {{- call | tojson(ensure_ascii=true) -}}{{- call | tojson(separators=(',', ':')) -}}
        {{- call.function.arguments | tojson(indent=2, ensure_ascii=False) -}}
        {%- for key, value in call.function.arguments.items() -%}
            {{- '|' ~ key ~ '=' ~ (value if value is string else value | tojson) -}}
        {%- endfor -%}
    {%- endfor -%}
    {{- '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if documents is defined and documents is none -%}{{- 'no documents' -}}{%- endif -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
TEMPLATES = {"llama 3.1": LLAMA31, "hermes": HERMES, "chatml": CHATML}

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Das Wetter für einen Ort <jetzt> & "später"',
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "漢字 or not"},
                "days": {"type": "integer"},
                "unit": {"type": ["string", "null"]},
            },
            "required": ["town"],
        },
    },
}
NOW: dict[str, Any] = {"name": "now", "parameters": {}}


def call(**arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK = turn("user", "Wie wird es in Köln?  ")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [ASK]},
    "answered": {"messages": [turn("system", " Be kind. "), ASK, turn("assistant", "Gut.")]},
    "tools": {"messages": [ASK], "tools": [WEATHER]},
    "tools and a system": {"messages": [turn("system", "S"), ASK], "tools": [WEATHER, WEATHER]},
    "bare tool": {"messages": [ASK], "tools": [NOW]},
    "no tools": {"messages": [ASK], "tools": []},
    "a call": {
        "messages": [
            ASK,
            turn("assistant", None, tool_calls=[call(town="Köln", days=2, unit=None)]),
            turn("tool", "Regen \u2028 <b>"),
            turn("assistant", "Es regnet."),
        ],
        "tools": [WEATHER],
    },
    "a call without tools": {
        "messages": [
            ASK,
            turn("assistant", "", tool_calls=[call(town='"', deep={"a": [1, 2.5, True]})]),
        ]
    },
    "two calls": {
        "messages": [
            ASK,
            turn("assistant", "", tool_calls=[call(town="Ulm"), call(town="Bonn")]),
            turn("tool", "1"),
            turn("tool", "2"),
            turn("user", "Und?"),
        ]
    },
    "thoughts": {
        "messages": [
            ASK,
            turn("assistant", "a", reasoning_content="\nfirst\n"),
            ASK,
            turn("assistant", "b", reasoning_content="\nsecond\n"),
        ]
    },
    "documents": {
        "messages": [ASK],
        "documents": [{"title": "T", "text": "Öl"}, {"title": "U", "text": "<doc>"}],
    },
    "parts": {"messages": [turn("user", [{"type": "text", "text": "a"}] * 2)]},
    "a role to be passed over": {"messages": [ASK, turn("skip", "x"), turn("assistant", "y")]},
    "other variables": {
        "messages": [ASK],
        "tools": [WEATHER],
        "variables": {"in_user": False, "date_string": "1 Jan 2026"},
    },
}
