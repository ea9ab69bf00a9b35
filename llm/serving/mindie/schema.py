"""Bodies of MindIE's own routes."""

from typing import Annotated, Any

from pydantic import Field

from llm.serving.bodies import Neutral, RequestBody, Whole
from llm.serving.openai.schema import CompletionRequest
from llm.serving.tgi.schema import GenerateParameters


class InferParameters(GenerateParameters):
    """``parameters`` of MindIE's ``/infer``, whose answers have no place for more."""

    return_full_text: Annotated[Any, Neutral(False)] = None
    decoder_input_details: Annotated[Any, Neutral(False)] = None
    best_of: Annotated[Any, Neutral(1)] = None
    top_n_tokens: Annotated[Any, Neutral(0)] = None


class InferRequest(RequestBody):
    """Body of MindIE's ``POST /infer``."""

    inputs: str
    stream: bool | None = None
    parameters: InferParameters | None = None


class InferTokenRequest(RequestBody):
    """Body of MindIE's ``POST /infer_token``, whose prompt is token ids."""

    input_id: list[Whole] = Field(min_length=1)
    stream: bool | None = None
    parameters: InferParameters | None = None


class PromptRequest(CompletionRequest):
    """Body of ``POST /generate`` in vLLM's form: a ``prompt`` and settings beside it.

    Its answers are texts, so that scores and usage have no place in them.
    """

    echo: Annotated[Any, Neutral(False)] = None
    logprobs: Annotated[Any, Neutral()] = None
    prompt_logprobs: Annotated[Any, Neutral()] = None
    stream_options: Annotated[Any, Neutral()] = None


class TokenizerRequest(RequestBody):
    """Body of ``POST /v1/tokenizer``."""

    inputs: str
