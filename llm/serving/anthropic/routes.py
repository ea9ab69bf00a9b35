"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from dataclasses import dataclass

from flask import Flask, Response

from llm.serving.anthropic.format import MessageFormat, error_body
from llm.serving.anthropic.plan import as_chat, marks_cache
from llm.serving.anthropic.schema import CountRequest, MessagesRequest
from llm.serving.bodies import parse_body
from llm.serving.openai.plan import chat_ids, plan_chat
from llm.serving.web import TYPED_EVENTS, Api, json_body, json_response


def add_routes(app: Flask, api: Api) -> None:
    """Add the family's routes to the application."""
    routes = _Routes(api)
    posts = {
        "/v1/messages": routes.messages,
        "/v1/messages/count_tokens": routes.count_tokens,
    }
    api.add(app, posts, error_body=error_body)


@dataclass(frozen=True)
class _Routes:
    api: Api

    def messages(self) -> Response:
        """``POST /v1/messages``."""
        body = parse_body(MessagesRequest, json_body())
        served = self.api.check_model(body.model)
        plan = plan_chat(as_chat(body), served, self.api.settings.limits)
        shape = MessageFormat(plan.adapter or served.model.name, plan, caches=marks_cache(body))
        return self.api.respond(plan, shape, stream=bool(body.stream), wire=TYPED_EVENTS)

    def count_tokens(self) -> Response:
        """``POST /v1/messages/count_tokens``."""
        body = parse_body(CountRequest, json_body())
        served = self.api.check_model(body.model)
        parser = self.api.settings.limits.tool_call_parser
        ids = chat_ids(as_chat(body), served, parser)
        return json_response({"input_tokens": len(ids)})
