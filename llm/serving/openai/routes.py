"""``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``."""

from dataclasses import dataclass
from typing import Any

from flask import Flask, Response

from llm.serving.bodies import checked, parse_body, parse_object
from llm.serving.loop import Served
from llm.serving.openai.format import ChatFormat, CompletionFormat, Shape
from llm.serving.openai.logprobs import TokenTexts
from llm.serving.openai.plan import plan_chat, plan_completion
from llm.serving.openai.schema import ChatRequest, CompletionRequest, StreamOptions
from llm.serving.paddlenlp.routes import answer_chat, is_paddlenlp
from llm.serving.web import OPENAI_EVENTS, Api, json_body, json_response


def add_routes(app: Flask, api: Api) -> None:
    """Add the family's routes to the application."""
    routes = _Routes(api)
    api.add(app, {"/v1/chat/completions": routes.chat, "/v1/completions": routes.completions})
    gets = {"/v1/models": routes.models, "/v1/models/<path:model_id>": routes.model}
    api.add(app, gets, method="GET")


@dataclass(frozen=True)
class _Routes:
    api: Api

    def chat(self) -> Response:
        """``POST /v1/chat/completions``."""
        content = parse_object(json_body())
        if is_paddlenlp(content):
            return answer_chat(self.api, content)
        body = checked(ChatRequest, content)
        served = self.api.check_model(body.model)
        plan = plan_chat(body, served, self.api.settings.limits)
        name = plan.adapter or served.model.name
        count = (body.top_logprobs or 0) if body.logprobs else None
        shape = ChatFormat(name, plan, _shape(body, served, count))
        return self.api.respond(plan, shape, stream=bool(body.stream), wire=OPENAI_EVENTS)

    def completions(self) -> Response:
        """``POST /v1/completions``."""
        body = parse_body(CompletionRequest, json_body())
        served = self.api.check_model(body.model)
        plan = plan_completion(body, served, self.api.settings.limits)
        name = plan.adapter or served.model.name
        told = _shape(body, served, body.logprobs, echo=bool(body.echo))
        shape = CompletionFormat(name, plan, told)
        return self.api.respond(plan, shape, stream=bool(body.stream), wire=OPENAI_EVENTS)

    def models(self) -> Response:
        """``GET /v1/models``."""
        names = *self.api.worker.served.names, *self.api.settings.aliases
        return json_response({"object": "list", "data": list(map(self._model, names))})

    def model(self, model_id: str) -> Response:
        """``GET /v1/models/ID``."""
        self.api.check_model(model_id)
        return json_response(self._model(model_id))

    def _model(self, name: str) -> dict[str, Any]:
        (model, engine), limits = self.api.worker.served, self.api.settings.limits
        of_adapter = {"parent": model.name} if name in model.adapter_names else {}
        return {
            "id": name,
            "object": "model",
            "created": self.api.created,
            "owned_by": "local",
            "max_model_len": engine.max_model_len,
            "max_prompt_tokens": min(limits.src_length, engine.max_model_len - 1),
            "max_new_tokens": limits.max_length,
            "has_chat_template": model.tokenizer.chat_template is not None,
            **of_adapter,  # as vLLM says what it stands on
        }


def _shape(
    body: ChatRequest | CompletionRequest,
    served: Served,
    logprobs: int | None,
    *,
    echo: bool = False,
) -> Shape:
    """Return what a body asks to be told beside the answers."""
    options = body.stream_options or StreamOptions()
    return Shape(
        TokenTexts(served.model, as_ids=bool(body.return_tokens_as_token_ids)),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        echo=echo,
        usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
    )
