"""Bodies of text-generation-inference's routes; MindIE's clients send a few fields more."""

from typing import Annotated, Any, Literal

from pydantic import Field

from llm.config.sampling import RANGES
from llm.serving.bodies import (
    MAX_CHOICES,
    Count,
    Neutral,
    PresencePenalty,
    RepetitionPenalty,
    RequestBody,
    Seed,
    StopList,
    TopP,
    TypicalP,
    Whole,
)

MAX_TOP_TOKENS = 20
LEAST_PRIORITY = 5  # MindIE's numbers: 1 comes first, 5 is the default


class Grammar(RequestBody):
    """``grammar``: what the answer obeys. ``json`` has a schema, as an object or as text;
    ``json_schema`` one in ``{"name", "schema"}``."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: str | dict[str, Any]


class GenerateParameters(RequestBody):
    """``parameters``; ``priority``, ``timeout`` (seconds) and ``batch_size`` are MindIE's."""

    max_new_tokens: Count = None
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0, le=RANGES["temperature"].most)
    top_k: Whole | None = Field(default=None, ge=1)
    top_p: TopP = None
    typical_p: TypicalP = None
    repetition_penalty: RepetitionPenalty = None
    frequency_penalty: PresencePenalty = None
    seed: Seed = None
    stop: StopList = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    truncate: Count = None
    best_of: Whole | None = Field(default=None, ge=1, le=MAX_CHOICES)
    top_n_tokens: Whole | None = Field(default=None, ge=0, le=MAX_TOP_TOKENS)
    grammar: Grammar | None = None
    adapter_id: str | None = None

    priority: Whole | None = Field(default=None, ge=1, le=LEAST_PRIORITY)
    timeout: Whole | None = Field(default=None, ge=1, le=3600)
    # MindIE reads it and does nothing with it: requests share steps as they come.
    batch_size: Count = None

    perf_stat: Annotated[Any, Neutral(False)] = None
    watermark: Annotated[Any, Neutral(False)] = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: as in TGI a setting of drawing says so, too."""
        return bool(
            self.do_sample
            or self.temperature not in (None, 1.0)
            or self.top_k is not None
            or self.top_p not in (None, 1.0)
            or self.typical_p not in (None, 1.0)
        )


class GenerateRequest(RequestBody):
    """Body of ``POST /``, ``/generate`` and ``/generate_stream``."""

    inputs: str
    stream: bool | None = None
    parameters: GenerateParameters | None = None
