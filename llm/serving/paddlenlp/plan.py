"""From a checked body of PaddleNLP's clients to what the engine has to do."""

from llm.serving.bodies import checked
from llm.serving.errors import ApiError
from llm.serving.loop import Served
from llm.serving.openai.plan import chat_ids
from llm.serving.openai.schema import ChatRequest
from llm.serving.paddlenlp.schema import PaddleNLPRequest
from llm.serving.requests import Checker, Limits, Plan, encode


def plan_paddlenlp(body: PaddleNLPRequest, served: Served, limits: Limits) -> Plan:
    """Render the conversation and check it against the model.

    As in PaddleNLP a ``context`` alone is the prompt itself where the model has no chat template.

    Raises:
        ApiError: 400.
    """
    name = "messages" if body.context is None else "context"
    as_text = served.model.tokenizer.chat_template is None and not body.history
    if body.context is not None and as_text:
        ids = encode(served, body.context, name)
        context = ids
    else:
        chat = checked(ChatRequest, {"messages": _messages(body)})
        ids, context = chat_ids(chat, served), []
    if body.src_length is not None and len(ids) > body.src_length:
        raise ApiError(
            f"{name} has {len(ids)} tokens, but src_length={body.src_length}; shorten it, or raise "
            "src_length",
            param="src_length",
            code="context_length_exceeded",
        )
    checker = Checker(served, limits, name, "max_length")
    prompt = checker.prompt(ids, None, context, body.max_length, limits.max_length)
    greedy = body.decode_strategy == "greedy_search" or body.top_p == 0
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = {
        "temperature": 0.0 if greedy else temperature,
        "top_k": body.top_k or 0,
        "top_p": body.top_p or 1.0,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "seed": body.seed,
    }
    return Plan([prompt], sampling, adapter=served.adapter(body.model))


def _messages(body: PaddleNLPRequest) -> list[dict[str, object]]:
    if body.messages is not None:
        return body.messages
    turns = [*body.history, body.context]
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
