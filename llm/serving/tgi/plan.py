"""From a checked body in text-generation-inference's form to what the engine has to do."""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from llm.engine.request import GrammarSpec
from llm.serving.errors import ApiError
from llm.serving.loop import Served
from llm.serving.requests import Checker, Limits, Plan, encode
from llm.serving.structured import Constraint, check_constraint
from llm.serving.tgi.schema import LEAST_PRIORITY, GenerateParameters, Grammar

GENERATE_TOKENS = 100  # TGI's default of max_new_tokens
_NO_ADAPTER = (None, "", "None")  # MindIE's word for none


def plan_generate(
    prompt: str | Sequence[int],
    parameters: GenerateParameters,
    served: Served,
    limits: Limits,
    *,
    stream: bool,
    tokens: int = GENERATE_TOKENS,
) -> Plan:
    """Encode the prompt and check it against the model.

    As in TGI, a setting of drawing, such as a temperature, samples even without ``do_sample``, and
    nothing of it is greedy.

    Args:
        prompt: a text, or token ids.
        parameters: of the body.
        served: the model.
        limits: of the server.
        stream: the answer is sent as it grows.
        tokens: new ones, where the request does not say how many.

    Raises:
        ApiError: 400; 404, an adapter that there is not.
    """
    _check_together(parameters, stream)
    name = "inputs" if isinstance(prompt, str) else "input_id"
    checker = Checker(served, limits, name, "parameters.max_new_tokens")
    if isinstance(prompt, str):
        ids, text = encode(served, prompt, name), prompt
    else:
        checker.token_ids(prompt)
        ids, text = list(prompt), None
    if parameters.truncate is not None:
        ids = ids[-parameters.truncate :]
    constraint = None if parameters.grammar is None else _constraint(parameters.grammar)
    return Plan(
        [checker.prompt(ids, text, ids, parameters.max_new_tokens, tokens)],
        _sampling(parameters),
        parameters.stop or [],
        n=parameters.best_of or 1,  # all of them are told
        adapter=_adapter(parameters.adapter_id, served),
        grammar=None if constraint is None else constraint.spec,
        priority=(parameters.priority or LEAST_PRIORITY) - LEAST_PRIORITY,
        timeout=parameters.timeout,
    )


def _check_together(parameters: GenerateParameters, stream: bool) -> None:
    """Refuse what greedy answers, or streams, cannot have."""
    best_of = parameters.best_of or 1
    if best_of > 1 and not parameters.samples:
        raise _fault(
            "best_of",
            f"parameters.best_of={best_of} greedy answers are all the same; send do_sample: true, "
            "or leave best_of out",
        )
    if stream and best_of > 1:
        raise _fault(
            "best_of",
            f"parameters.best_of={best_of}: which answer is the best is known when all have ended, "
            "not in a stream; drop one of them",
        )
    if stream and parameters.decoder_input_details:
        raise _fault(
            "decoder_input_details",
            "parameters.decoder_input_details has no place in a stream; drop one of them",
        )


def _fault(name: str, message: str) -> ApiError:
    return ApiError(message, param=f"parameters.{name}", code="invalid_value")


def _constraint(grammar: Grammar) -> Constraint:
    param, value = "parameters.grammar", grammar.value
    if grammar.type == "regex":
        if not isinstance(value, str):
            raise _fault("grammar", f"{param}.value of a regex has to be a text")
        found = Constraint(param, GrammarSpec("regex", value))
    else:
        if grammar.type == "json_schema":
            if not isinstance(value, dict) or not isinstance(value.get("schema"), dict):
                raise _fault("grammar", f'{param}.value has to be {{"schema": {{...}}}}')
            value = value["schema"]
        source = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        found = Constraint(param, GrammarSpec("json_schema", source))
    check_constraint(found)
    return found


def _adapter(name: str | None, served: Served) -> str | None:
    if name in (*_NO_ADAPTER, served.model.name):
        return None
    if name not in served.model.adapter_names:
        there = ", ".join(map(repr, served.model.adapter_names)) or "none"
        raise ApiError(
            f"parameters.adapter_id={name!r} is not served here; adapters: {there}",
            status=404,
            param="parameters.adapter_id",
            code="model_not_found",
        )
    return name


def _sampling(parameters: GenerateParameters) -> dict[str, Any]:
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    sampling = {
        "temperature": temperature if parameters.samples else 0.0,
        "top_k": parameters.top_k or 0,
        "top_p": 1.0 if parameters.top_p is None else parameters.top_p,
        "typical_p": 1.0 if parameters.typical_p is None else parameters.typical_p,
        "repetition_penalty": parameters.repetition_penalty or 1.0,
        "frequency_penalty": parameters.frequency_penalty or 0.0,
        "logprobs": parameters.top_n_tokens or 0,
        "prompt_logprobs": 0 if parameters.decoder_input_details else None,
        "seed": parameters.seed,
    }
    if parameters.samples and parameters.seed is None:
        # Reported in the details, to have the answer again; any client's numbers can hold it.
        sampling["seed"] = secrets.randbits(53)
    return sampling
