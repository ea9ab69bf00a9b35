"""From a list of items to the conversation that the chat template renders."""

from typing import Any

from llm.serving.bodies import checked
from llm.serving.openai.schema import ChatRequest
from llm.serving.responses.schema import (
    AllowedTools,
    CallItem,
    CountRequest,
    NamedTool,
    OutputItem,
    ResponsesRequest,
    TextPart,
)


def as_chat(body: CountRequest) -> ChatRequest:
    """Return the request as the chat route would take it.

    Raises:
        ApiError: 400.
    """
    content: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "parallel_tool_calls": body.parallel_tool_calls,
    }
    if isinstance(body, ResponsesRequest):
        content |= {
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "logprobs": body.logprobs is not None,
            "top_logprobs": body.logprobs or None,
        }
    if body.tools:
        content["tools"] = [
            {
                "type": "function",
                "function": tool.model_dump(include=_FUNCTION, exclude_none=True),
            }
            for tool in body.tools
        ]
    content["tool_choice"] = _choice(body)
    if body.text is not None and (form := body.text.format) is not None:
        content["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            schema = form.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
            content["response_format"]["json_schema"] = schema
    return checked(ChatRequest, content)


_SYSTEM = {"system", "developer"}
_FUNCTION = {"name", "description", "parameters", "strict"}


def _choice(body: CountRequest) -> Any:
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        return _named(choice)
    if isinstance(choice, AllowedTools):
        allowed = {"mode": choice.mode, "tools": list(map(_named, choice.tools))}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _named(tool: NamedTool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


def _messages(body: CountRequest) -> list[dict[str, Any]]:
    """Return the turns; calls belong to the assistant's turn before them, if there is one."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    for item in body.input:
        if isinstance(item, OutputItem):
            text = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
        elif isinstance(item, CallItem):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif messages and {messages[-1]["role"], item.role} <= _SYSTEM:
            messages[-1]["content"] += "\n" + _text(item.content)  # templates know of one
        else:
            messages.append({"role": item.role, "content": _text(item.content)})
    return messages


def _text(parts: list[TextPart]) -> str:
    return "".join(part.text for part in parts)
