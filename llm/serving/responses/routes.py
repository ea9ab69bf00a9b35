"""``/v1/responses`` and ``/v1/responses/input_tokens``."""

from dataclasses import dataclass

from flask import Flask, Response

from llm.serving.bodies import parse_body
from llm.serving.openai.logprobs import TokenTexts
from llm.serving.openai.plan import chat_ids, plan_chat
from llm.serving.responses.format import ResponseFormat
from llm.serving.responses.plan import as_chat
from llm.serving.responses.schema import CountRequest, ResponsesRequest
from llm.serving.web import TYPED_EVENTS, Api, json_body, json_response


def add_routes(app: Flask, api: Api) -> None:
    """Add the family's routes to the application."""
    routes = _Routes(api)
    posts = {"/v1/responses": routes.create, "/v1/responses/input_tokens": routes.input_tokens}
    api.add(app, posts)


@dataclass(frozen=True)
class _Routes:
    api: Api

    def create(self) -> Response:
        """``POST /v1/responses``."""
        body = parse_body(ResponsesRequest, json_body())
        served = self.api.check_model(body.model)
        plan = plan_chat(as_chat(body), served, self.api.settings.limits)
        name = plan.adapter or served.model.name
        shape = ResponseFormat(name, body, plan, TokenTexts(served.model))
        return self.api.respond(plan, shape, stream=bool(body.stream), wire=TYPED_EVENTS)

    def input_tokens(self) -> Response:
        """``POST /v1/responses/input_tokens``."""
        body = parse_body(CountRequest, json_body())
        served = self.api.check_model(body.model)
        ids = chat_ids(as_chat(body), served, self.api.settings.limits.tool_call_parser)
        return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})
