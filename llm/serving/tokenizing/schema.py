"""Bodies of ``/tokenize`` and ``/detokenize``, under vLLM's names."""

from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llm.serving.bodies import RequestBody, Whole

# Fields of chats; what they mean and may be is the chat route's own matter.
OF_CHATS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


class TokenizeRequest(RequestBody):
    """Body of ``POST /tokenize``: a text, or a conversation in ``messages`` and what goes with it.

    ``add_special_tokens`` puts the beginning-of-sequence token before a text; what stands before a
    conversation its template writes.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _text_or_conversation(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "send either prompt or messages")
        if self.messages is not None:
            if self.add_special_tokens:
                raise PydanticCustomError(
                    "add_special_tokens",
                    "messages get their special tokens from the chat template; leave "
                    "add_special_tokens out",
                )
            return self
        for name in OF_CHATS:
            if getattr(self, name) is not None:
                raise PydanticCustomError(name, "{name} only goes with messages", {"name": name})
        return self


class DetokenizeRequest(RequestBody):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[Whole]
