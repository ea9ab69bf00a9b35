"""``/``, ``/generate``, ``/generate_stream`` and ``/info``."""

from dataclasses import dataclass
from typing import Any

from flask import Flask, Response

from common import __version__
from llm.serving.bodies import MAX_CHOICES, MAX_STOPS, checked, parse_object
from llm.serving.errors import ApiError
from llm.serving.mindie.routes import answer_prompt
from llm.serving.tgi.format import GenerateFormat
from llm.serving.tgi.plan import plan_generate
from llm.serving.tgi.schema import GenerateParameters, GenerateRequest
from llm.serving.web import Api, json_body, json_response


def add_routes(app: Flask, api: Api) -> None:
    """Add the family's routes to the application."""
    routes = _Routes(api)
    posts = {
        "/": routes.root,
        "/generate": routes.generate,
        "/generate_stream": routes.generate_stream,
    }
    api.add(app, posts, error_body=ApiError.tgi_body)
    api.add(app, {"/info": routes.info}, method="GET", error_body=ApiError.tgi_body)


@dataclass(frozen=True)
class _Routes:
    api: Api

    def root(self) -> Response:
        """``POST /``: as ``/generate``; a whole answer is a list of one."""
        return self._generate(parse_object(json_body()), as_list=True)

    def generate(self) -> Response:
        """``POST /generate``: the form says whether TGI's is meant or vLLM's."""
        content = parse_object(json_body())
        if "prompt" in content and "inputs" not in content:
            return answer_prompt(self.api, content)
        return self._generate(content)

    def generate_stream(self) -> Response:
        """``POST /generate_stream``."""
        content = parse_object(json_body())
        if content.get("stream") is False:
            raise ApiError(
                "stream=false contradicts /generate_stream; leave it out, or use /generate",
                param="stream",
                code="invalid_value",
            )
        return self._generate({**content, "stream": True})

    def _generate(self, content: dict[str, Any], *, as_list: bool = False) -> Response:
        body = checked(GenerateRequest, content)
        parameters, stream = body.parameters or GenerateParameters(), bool(body.stream)
        served, limits = self.api.worker.served, self.api.settings.limits
        plan = plan_generate(body.inputs, parameters, served, limits, stream=stream)
        shape = GenerateFormat(
            plan,
            served.model,
            details=bool(parameters.details or parameters.decoder_input_details),
            prefill=bool(parameters.decoder_input_details),
            return_full_text=bool(parameters.return_full_text),
            as_list=as_list,
        )
        return self.api.respond(plan, shape, stream=stream)

    def info(self) -> Response:
        """``GET /info``: what is served, and the limits of a request."""
        (model, engine), limits = self.api.worker.served, self.api.settings.limits
        longest = min(limits.src_length, engine.max_model_len - 1)
        return json_response(
            {
                "model_id": model.name,
                "model_sha": None,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": engine.max_sequences,
                "max_best_of": MAX_CHOICES,
                "max_stop_sequences": MAX_STOPS,
                "max_input_tokens": longest,
                "max_input_length": longest,  # its name in older versions and in MindIE
                "max_total_tokens": engine.max_model_len,
                "max_client_batch_size": 1,
                "router": "llm.serving",
                "version": __version__,
                "sha": None,
                "docker_label": None,
            }
        )
