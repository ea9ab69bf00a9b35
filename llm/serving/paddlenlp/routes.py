"""``/api/chat``, and ``/v1/chat/completions`` for a body with PaddleNLP's fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response

from llm.serving.bodies import checked, parse_body
from llm.serving.openai.format import ChatFormat, Shape
from llm.serving.openai.logprobs import TokenTexts
from llm.serving.paddlenlp.format import LINES, MessageFormat, UtteranceFormat, error_line
from llm.serving.paddlenlp.plan import plan_paddlenlp
from llm.serving.paddlenlp.schema import OWN_FIELDS, PaddleNLPRequest
from llm.serving.web import OPENAI_EVENTS, Api, json_body


def add_routes(app: Flask, api: Api) -> None:
    """Add the family's routes to the application."""
    api.add(app, {"/api/chat": _Routes(api).utterances}, error_body=error_line)


def is_paddlenlp(content: Mapping[str, Any]) -> bool:
    """Tell whether a body has a field that only PaddleNLP's clients send."""
    return any(content.get(name) is not None for name in OWN_FIELDS)


def answer_chat(api: Api, content: dict[str, Any]) -> Response:
    """Answer such a body on ``/v1/chat/completions``.

    PaddleNLP's server always streams, in a shape of its own; ``stream`` asks for OpenAI's.
    """
    body = checked(PaddleNLPRequest, content)
    served = api.check_model(body.model)
    plan = plan_paddlenlp(body, served, api.settings.limits)
    model_id = plan.adapter or served.model.name
    if body.stream is None:
        return api.stream(plan, MessageFormat(model_id), OPENAI_EVENTS)
    shape = ChatFormat(model_id, plan, Shape(TokenTexts(served.model)))
    return api.respond(plan, shape, stream=body.stream, wire=OPENAI_EVENTS)


@dataclass(frozen=True)
class _Routes:
    api: Api

    def utterances(self) -> Response:
        """``POST /api/chat``."""
        body = parse_body(PaddleNLPRequest, json_body())
        served = self.api.check_model(body.model)
        plan = plan_paddlenlp(body, served, self.api.settings.limits)
        return self.api.stream(plan, UtteranceFormat(), LINES)
