"""From a checked body of OpenAI's routes to what the engine has to do."""

from collections.abc import Sequence
from typing import Any

from data.tokenization.added_tokens import Region
from data.tokenizer import Tokenizer
from llm.engine.request import GrammarSpec
from llm.serving.errors import ApiError
from llm.serving.loop import Served
from llm.serving.openai.schema import ChatRequest, CompletionRequest
from llm.serving.requests import Checker, Limits, Plan, encode
from llm.serving.tools.dialect import AUTO, dialect_of, with_tools
from llm.serving.tools.plan import plan_tools

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions
# What templates get in fields of their own.
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message")


def plan_chat(body: ChatRequest, served: Served, limits: Limits) -> Plan:
    """Render the conversation and check it against the model.

    Raises:
        ApiError: 400.
    """
    calls, grammar = plan_tools(body, served.model.tokenizer, limits.tool_call_parser)
    ids = chat_ids(body, served, limits.tool_call_parser)
    wanted = body.max_completion_tokens or body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    checker = Checker(served, limits, "messages", name)
    context = ids if body.continue_final_message else ()
    prompt = checker.prompt(ids, None, context, wanted, limits.max_length)
    sampling = _sampling(body, served)
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    sampling["prompt_logprobs"] = body.prompt_logprobs
    return Plan([prompt], sampling, calls=calls, **_options(body, served, grammar))


def chat_ids(body: ChatRequest, served: Served, parser: str = AUTO) -> list[int]:
    """Return the conversation as the model's template writes it, with the tools that it may call.

    Args:
        body: the request.
        served: the model.
        parser: of its calls.

    Raises:
        ApiError: 400, there is no template, or it refuses the conversation.
    """
    tokenizer = served.model.tokenizer
    if tokenizer.chat_template is None:
        raise ApiError(
            f"model {served.model.name!r} has no chat template; use /v1/completions, or start the "
            "server with --chat_template (llama2, llama3, simple, or a Jinja file)",
            param="messages",
            code="no_chat_template",
        )
    messages = [message.as_template_message() for message in body.messages]
    tools = (
        [] if body.tool_choice == "none" else [one.as_template_tool() for one in body.tools or ()]
    )
    variables: dict[str, Any] = {}
    if tools or any("tool_calls" in one or one["role"] == "tool" for one in messages):
        messages, variables = with_tools(messages, tools, dialect_of(tokenizer, parser))
    variables |= _template_variables(body, tokenizer)
    begins = body.add_generation_prompt
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not body.continue_final_message if begins is None else begins,
            continue_final_message=bool(body.continue_final_message),
            **variables,
        )
    except ValueError as error:
        # Templates raise on what the model was not trained for, such as two turns of one role.
        raise ApiError(str(error), param="messages", code="chat_template") from error


def _template_variables(body: ChatRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the template gets besides; a variable that it does not know has to be off."""
    given = body.chat_template_kwargs or {}
    if not given:
        return {}
    known = tokenizer.template_variables(tools=bool(body.tools))
    for name, value in given.items():
        param = f"chat_template_kwargs.{name}"
        if name in _RESERVED:
            raise ApiError(
                f"{param}: send {name} as a field of the body itself", param=param, code="misplaced"
            )
        if value and name not in known:
            raise ApiError(
                f"{param}={value!r:.60}: this model's chat template knows no {name}; leave it out",
                param=param,
                code="unsupported_value",
            )
    return given


def plan_completion(body: CompletionRequest, served: Served, limits: Limits) -> Plan:
    """Encode the prompts and check them against the model.

    Raises:
        ApiError: 400.
    """
    prompts = []
    for position, given in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt.{position}"
        checker = Checker(served, limits, param, "max_tokens")
        if isinstance(given, str):
            ids, text = (
                encode(served, given, param, bos=body.add_special_tokens),
                given,
            )
        else:
            checker.token_ids(given)
            ids, text = given, (served.model.tokenizer.decode(given) if body.echo else None)
        prompts.append(checker.prompt(ids, text, ids, body.max_tokens, DEFAULT_COMPLETION_TOKENS))
    sampling = _sampling(body, served)
    sampling["logprobs"] = body.logprobs or 0
    asked = [body.prompt_logprobs, body.logprobs if body.echo else None]
    scored = [count for count in asked if count is not None]
    sampling["prompt_logprobs"] = max(scored) if scored else None
    constraint = body.constraint()
    grammar = None if constraint is None else constraint.spec
    options = _options(body, served, grammar)
    return Plan(prompts, sampling, best_of=body.best_of, **options)


def _options(
    body: ChatRequest | CompletionRequest, served: Served, grammar: GrammarSpec | None
) -> dict[str, Any]:
    """Return what both routes say of a plan."""
    if grammar is not None and body.ignore_eos:
        raise ApiError(
            "ignore_eos has the answer go on past its end, and a grammar says where that is; send "
            "one of them",
            param="ignore_eos",
            code="invalid_value",
        )
    return {
        "stops": body.stop or [],
        "n": body.n or 1,
        "adapter": served.adapter(body.model),
        "grammar": grammar,
        "priority": body.priority or 0,
        "keep_stop": bool(body.include_stop_str_in_output),
        "show_control": body.skip_special_tokens is False,
    }


def _sampling(body: ChatRequest | CompletionRequest, served: Served) -> dict[str, Any]:
    stop_ids = body.stop_token_ids or []
    Checker(served, None, "stop_token_ids", "").token_ids(stop_ids)
    biases = [(int(token_id), bias) for token_id, bias in (body.logit_bias or {}).items()]
    Checker(served, None, "logit_bias", "").token_ids([token_id for token_id, _ in biases])
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_k": max(body.top_k or 0, 0),
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "min_p": body.min_p or 0.0,
        "typical_p": 1.0 if body.typical_p is None else body.typical_p,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": tuple(biases),
        "bad_words": bad_word_ids(body.bad_words or (), served.model.tokenizer),
        "seed": body.seed,
        "stop_ids": tuple(stop_ids),
        "ignore_eos": bool(body.ignore_eos),
    }


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return what may not come where words may not: each as it stands and behind a space.

    Args:
        words: texts of at least one character.
        tokenizer: of the model.
    """
    forms = [form for word in words for form in (word, f" {word.lstrip()}")]
    regions = [Region((form,), "bare") for form in forms]
    ids = [tuple(row.ids) for row in tokenizer.encode_regions(regions)] if forms else []
    return tuple(dict.fromkeys(one for one in ids if one))
