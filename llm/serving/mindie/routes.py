"""``/infer``, ``/infer_token``, ``/v1/tokenizer``, and ``/generate`` with a ``prompt``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flask import Flask, Response

from llm.serving.bodies import checked, parse_body
from llm.serving.errors import ApiError
from llm.serving.mindie.format import NULS, InferFormat, TextsFormat
from llm.serving.mindie.schema import (
    InferParameters,
    InferRequest,
    InferTokenRequest,
    PromptRequest,
    TokenizerRequest,
)
from llm.serving.openai.plan import plan_completion
from llm.serving.requests import encode
from llm.serving.tgi.plan import plan_generate
from llm.serving.tokenizing.routes import token_texts
from llm.serving.web import Api, json_body, json_response

INFER_TOKENS = 20  # MindIE's default of max_new_tokens


def add_routes(app: Flask, api: Api) -> None:
    """Add the family's routes to the application."""
    routes = _Routes(api)
    posts = {
        "/infer": routes.infer,
        "/infer_token": routes.infer_token,
        "/v1/tokenizer": routes.tokenizer,
    }
    api.add(app, posts, error_body=ApiError.tgi_body)


def answer_prompt(api: Api, content: dict[str, Any]) -> Response:
    """Answer a body of ``/generate`` in vLLM's form.

    Without ``max_tokens`` an answer may be as long as the server allows, as in MindIE.
    """
    if not isinstance(content["prompt"], str):
        raise ApiError(
            f"prompt={content['prompt']!r:.60} has to be one text; /v1/completions takes several",
            param="prompt",
            code="invalid_value",
        )
    if content.get("model") == "None":  # MindIE's word for no adapter
        content = {**content, "model": None}
    body = checked(PromptRequest, content)
    served, limits = api.check_model(body.model), api.settings.limits
    plan = plan_completion(body, served, limits)
    if body.max_tokens is None:
        prompt = plan.prompts[0]
        room = served.engine.max_model_len - len(prompt.ids)
        prompt = replace(prompt, max_tokens=min(limits.max_length, room))
        plan = replace(plan, prompts=[prompt])
    return api.respond(plan, TextsFormat(plan), stream=bool(body.stream), wire=NULS)


@dataclass(frozen=True)
class _Routes:
    api: Api

    def infer(self) -> Response:
        """``POST /infer``."""
        body = parse_body(InferRequest, json_body())
        return self._infer(body.inputs, body.parameters, bool(body.stream))

    def infer_token(self) -> Response:
        """``POST /infer_token``."""
        body = parse_body(InferTokenRequest, json_body())
        return self._infer(body.input_id, body.parameters, bool(body.stream))

    def _infer(
        self, prompt: str | Sequence[int], given: InferParameters | None, stream: bool
    ) -> Response:
        parameters = given or InferParameters()
        served, limits = self.api.worker.served, self.api.settings.limits
        plan = plan_generate(prompt, parameters, served, limits, stream=stream, tokens=INFER_TOKENS)
        shape = InferFormat(plan, details=bool(parameters.details))
        return self.api.respond(plan, shape, stream=stream)

    def tokenizer(self) -> Response:
        """``POST /v1/tokenizer``."""
        body = parse_body(TokenizerRequest, json_body())
        served = self.api.worker.served
        ids = encode(served, body.inputs, "inputs")
        texts = token_texts(served.model.tokenizer, ids)
        return json_response({"token_number": len(ids), "tokens": texts})
