"""From a conversation in Anthropic's words to one in OpenAI's, which the chat template renders."""

import json
from typing import Any

from pydantic import BaseModel

from llm.serving.anthropic.schema import (
    AssistantMessage,
    CountRequest,
    MessagesRequest,
    TextBlock,
    ToolChoice,
    ToolResultBlock,
    UserMessage,
)
from llm.serving.bodies import checked
from llm.serving.errors import ApiError
from llm.serving.openai.schema import ChatRequest

# By this word Anthropic's client knows that it has to send conversations whole.
NO_THREADS = "thread_unsupported_request"


def as_chat(body: CountRequest) -> ChatRequest:
    """Return the request as the chat route would take it.

    Raises:
        ApiError: 400.
    """
    if body.thread is not None:
        raise ApiError(
            "thread: this server stores nothing between requests; send the whole conversation "
            "without it",
            param="thread",
            code=NO_THREADS,
        )
    messages = _messages(body)
    content: dict[str, Any] = {"model": body.model, "messages": messages}
    if isinstance(body.messages[-1], AssistantMessage):
        if messages[-1].get("tool_calls"):
            raise ApiError(
                "messages: the last one calls a tool; send what that gave (tool_result) behind it",
                param="messages",
                code="invalid_value",
            )
        if messages[-1]["content"]:
            content["continue_final_message"] = True
        else:  # the beginning of an answer of which nothing is given
            messages.pop()
    if body.tools:
        content["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in body.tools
        ]
    if body.tool_choice is not None:
        content |= _choice(body.tool_choice, bool(body.tools))
    if (form := _format(body)) is not None:
        schema = {"name": "output", "schema": form}
        content["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesRequest):
        content |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
        }
    return checked(ChatRequest, content)


def marks_cache(value: Any) -> bool:
    """Tell whether a body says anywhere what is to be kept in a cache of prompts."""
    if isinstance(value, BaseModel):
        if getattr(value, "cache_control", None) is not None:
            return True
        return any(marks_cache(getattr(value, name)) for name in type(value).model_fields)
    return isinstance(value, list) and any(map(marks_cache, value))


def _messages(body: CountRequest) -> list[dict[str, Any]]:
    """Return the turns; neighbours of one role are one turn, as Anthropic's API has it."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        if isinstance(message, UserMessage):
            turns = _user(message)
        elif isinstance(message, AssistantMessage):
            turns = [_assistant(message)]
        else:
            turns = [{"role": "system", "content": _text(message.content)}]
        for turn in turns:
            last = messages[-1] if messages else {"role": ""}
            if turn["role"] == last["role"] != "tool":
                _join(last, turn)
            else:
                messages.append(turn)
    return messages


def _user(message: UserMessage) -> list[dict[str, Any]]:
    """Return a turn's results of tools and its texts, in order."""
    turns: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            text = _text(block.content or [])
            # A template has no other place for it.
            said = f"Error: {text}" if block.is_error else text
            turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": said})
        elif turns and turns[-1]["role"] == "user":
            turns[-1]["content"] += block.text
        else:
            turns.append({"role": "user", "content": block.text})
    return turns


def _assistant(message: AssistantMessage) -> dict[str, Any]:
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    turn: dict[str, Any] = {"role": "assistant", "content": _text(texts) if texts else None}
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input)},
        }
        for block in message.content
        if not isinstance(block, TextBlock)
    ]
    return {**turn, "tool_calls": calls} if calls else turn


def _join(first: dict[str, Any], second: dict[str, Any]) -> None:
    texts = [turn["content"] for turn in (first, second) if turn["content"]]
    first["content"] = "\n".join(texts) if texts else first["content"]
    if calls := [*first.get("tool_calls", []), *second.get("tool_calls", [])]:
        first["tool_calls"] = calls


def _text(blocks: list[TextBlock]) -> str:
    return "".join(block.text for block in blocks)


def _choice(choice: ToolChoice, has_tools: bool) -> dict[str, Any]:
    if (choice.type == "tool") != (choice.name is not None):
        raise ApiError(
            'tool_choice: type "tool" and a name go together',
            param="tool_choice.name",
            code="invalid_value",
        )
    if choice.type in ("any", "tool") and not has_tools:
        raise ApiError(
            f'tool_choice of type "{choice.type}" needs tools; send some',
            param="tools",
            code="invalid_value",
        )
    words: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    named = {"type": "function", "function": {"name": choice.name}}
    found: dict[str, Any] = {"tool_choice": words.get(choice.type, named)}
    if choice.disable_parallel_tool_use is not None:
        found["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return found


def _format(body: CountRequest) -> dict[str, Any] | None:
    of_config = body.output_config.format if body.output_config else None
    if of_config is not None and body.output_format is not None:
        raise ApiError(
            "output_config.format and output_format both give a form; send output_config alone",
            param="output_format",
            code="invalid_value",
        )
    form = of_config or body.output_format
    return None if form is None else form.schema_
