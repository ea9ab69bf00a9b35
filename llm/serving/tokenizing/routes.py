"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, in vLLM's shapes."""

from dataclasses import dataclass

from flask import Flask, Response

from data.tokenizer import Tokenizer
from llm.serving.bodies import checked, parse_body
from llm.serving.openai.plan import chat_ids
from llm.serving.openai.schema import ChatRequest
from llm.serving.requests import Checker, encode
from llm.serving.tokenizing.schema import OF_CHATS, DetokenizeRequest, TokenizeRequest
from llm.serving.web import Api, json_body, json_response


def add_routes(app: Flask, api: Api) -> None:
    """Add the family's routes to the application."""
    routes = _Routes(api)
    api.add(app, {"/tokenize": routes.tokenize, "/detokenize": routes.detokenize})
    api.add(app, {"/tokenizer_info": routes.tokenizer_info}, method="GET")


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return what each token stands for inside a text; half a character is U+FFFD."""
    special = tokenizer.special_text
    return [
        special.get(one) or tokenizer.token_bytes(one).decode("utf-8", errors="replace")
        for one in ids
    ]


@dataclass(frozen=True)
class _Routes:
    api: Api

    def tokenize(self) -> Response:
        """``POST /tokenize``."""
        body = parse_body(TokenizeRequest, json_body())
        served = self.api.check_model(body.model)
        tokenizer = served.model.tokenizer
        ids = self._ids(body)
        texts = token_texts(tokenizer, ids) if body.return_token_strs else None
        return json_response(
            {
                "count": len(ids),
                "max_model_len": served.engine.max_model_len,
                "tokens": ids,
                "token_strs": texts,
            }
        )

    def _ids(self, body: TokenizeRequest) -> list[int]:
        served = self.api.worker.served
        if body.prompt is None:
            given = body.model_dump(include={"messages", *OF_CHATS}, exclude_none=True)
            parser = self.api.settings.limits.tool_call_parser
            return chat_ids(checked(ChatRequest, given), served, parser)
        # Inside a text the text of a control token is ordinary characters; a prompt that is nothing
        # else asks for its id, as lm-eval's clients do.
        special = served.model.tokenizer.special.ids.get(body.prompt)
        bos = body.add_special_tokens
        if special is not None and bos is False:
            return [special]
        return encode(served, body.prompt, "prompt", bos=bos)

    def detokenize(self) -> Response:
        """``POST /detokenize``."""
        body = parse_body(DetokenizeRequest, json_body())
        served = self.api.check_model(body.model)
        tokenizer = served.model.tokenizer
        Checker(served, None, "tokens", "").token_ids(body.tokens)
        # A model may have more ids than its tokenizer; they stand for no text.
        ids = [one for one in body.tokens if one < tokenizer.vocab_size]
        return json_response({"prompt": tokenizer.decode(ids, skip_special=False)})

    def tokenizer_info(self) -> Response:
        """``GET /tokenizer_info``: tokenizer_config.json with the chat template."""
        tokenizer = self.api.worker.served.model.tokenizer
        return json_response({**tokenizer.config(), "chat_template": tokenizer.chat_template})
