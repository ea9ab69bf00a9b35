"""Body of a request to PaddleNLP's flask server, as its sample of requests sends it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from llm.config.sampling import RANGES
from llm.serving.bodies import (
    Count,
    Neutral,
    RepetitionPenalty,
    RequestBody,
    Seed,
    Whole,
    read_json,
)

# Fields that OpenAI's API does not have: one of them says whose client it is.
OWN_FIELDS = (
    *("context", "history", "extra_info", "max_length", "min_length", "src_length"),
    "decode_strategy",
)


def _known_strategy(value: Any) -> Any:
    if value in ("beam_search", "group_beam_search"):
        raise PydanticCustomError(
            "unsupported_value",
            "beams are not kept by this server; send sampling or greedy_search",
        )
    return value


def _as_turns(value: Any) -> Any:
    """Bring the shapes of ``history`` to a list: of texts, of utterances, or JSON of either."""
    if isinstance(value, str):
        try:
            value = read_json(value) if value else []
        except ValueError as error:
            raise PydanticCustomError(
                "history", "is a text that is not JSON: {why}", {"why": str(error)}
            ) from None
    if not isinstance(value, list):
        return value
    return [one.get("utterance", one) if isinstance(one, dict) else one for one in value]


def _in_pairs(value: list[str]) -> list[str]:
    if len(value) % 2:
        raise PydanticCustomError(
            "history",
            "has {count} turns; user and assistant take turns, so it has to be an even number",
            {"count": len(value)},
        )
    return value


class PaddleNLPRequest(RequestBody):
    """``context`` with ``history``, or ``messages``, and PaddleNLP's names of the settings.

    ``top_p`` 0 is greedy, as is ``decode_strategy`` ``greedy_search``.
    """

    context: str | None = None
    history: Annotated[list[str], BeforeValidator(_as_turns), AfterValidator(_in_pairs)] = Field(
        default_factory=list
    )
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    model: str | None = None
    stream: bool | None = None
    max_length: Count = None
    src_length: Count = None
    top_k: Whole | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    temperature: float | None = Field(default=None, ge=0, le=RANGES["temperature"].most)
    repetition_penalty: RepetitionPenalty = None
    seed: Seed = None
    decode_strategy: Annotated[
        Literal["sampling", "greedy_search"] | None, BeforeValidator(_known_strategy)
    ] = None

    # PaddleNLP's own server reads it and does nothing with it; 1 is what its sample sends.
    min_length: Annotated[Any, Neutral(0, 1)] = None
    # Bookkeeping of its clients.
    extra_info: Any = None

    @model_validator(mode="after")
    def _one_conversation(self) -> "PaddleNLPRequest":
        if (self.context is None) == (self.messages is None):
            raise PydanticCustomError("context", "send either context or messages")
        if self.messages is not None and self.history:
            raise PydanticCustomError(
                "history", "history only goes with context; messages hold all turns"
            )
        return self
