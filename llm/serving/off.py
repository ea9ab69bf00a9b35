"""Fields of other servers that are accepted at the values with which nothing changes.

Clients send their servers' defaults. A field is here because this server has nothing like it;
any other value would change the answer, and is refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

# Bookkeeping of a provider or client: never has an effect on the answer.
ANYTHING = object()

OPENAI: dict[str, Any] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ANYTHING,
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": ANYTHING,
    "prompt_cache_options": ANYTHING,
    "prompt_cache_retention": ANYTHING,
    "reasoning_effort": ("none",),
    "safety_identifier": ANYTHING,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": ANYTHING,
    "verbosity": ("medium",),
    "web_search_options": (),
}
VLLM: dict[str, Any] = {
    "allowed_token_ids": ([],),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_content_format": ("auto", "string"),
    "data_parallel_rank": (),
    "documents": ([],),
    "early_stopping": (False,),
    "guided_decoding_backend": ("auto", "guidance"),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True, False),  # there is none to include
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "request_id": ANYTHING,
    "return_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
SGLANG: dict[str, Any] = {
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "ebnf": (),
    "extra_key": (),
    "input_ids": (),
    "json_schema": (),
    "lora_path": (),
    "no_stop_trim": (False,),
    "regex": (),
    "return_hidden_states": (False,),
    "rid": ANYTHING,
    "separate_reasoning": (True, False),
    "session_params": ({},),
    "stop_regex": ([],),
    "stream_reasoning": (True, False),
}
TGI: dict[str, Any] = {
    "adapter_id": (),
    "decoder_input_details": (False,),
    "grammar": (),
    "guideline": (),
    "return_full_text": (False,),
    "tool_prompt": (),
    "top_n_tokens": (0,),
    "truncate": (),
    "watermark": (False,),
}
LLAMA_CPP: dict[str, Any] = {
    "cache_prompt": (True, False),  # the same answer, whatever the cache has
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "id_slot": (-1,),
    "mirostat": (0,),
    "n_probs": (0,),
    "return_progress": (False,),
    "t_max_predict_ms": (0,),
    "timings_per_token": (False,),
    "top_n_sigma": (-1,),
    "xtc_probability": (0,),
}
OFF: dict[str, Any] = OPENAI | VLLM | SGLANG | TGI | LLAMA_CPP
# Where a route's own fields or another route do what is asked for.
INSTEAD = {
    "functions": "send them as tools",
    "function_call": "send tool_choice",
    "grammar": "send guided_grammar",
    "ebnf": "send guided_grammar",
    "regex": "send guided_regex",
    "json_schema": "send guided_json",
    "lora_path": "send the adapter's name as model",
    "adapter_id": "send the adapter's name as model",
    "suffix": "this model continues a text and fills no gaps; put what it needs into the prompt",
    "echo": "send continue_final_message: true, and put the two together",
    "chat_template": "start the server with --chat_template",
}


def is_off(value: Any, allowed: Any) -> bool:
    """Whether a value changes nothing: null, or one that is allowed."""
    if value is None or allowed is ANYTHING:
        return True
    # 0 and False are equal, but who writes one for the other has mistaken the field.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def without_off(known: Mapping[str, Any], content: dict[str, Any], title: str) -> dict[str, Any]:
    """Return a body without fields that are off.

    Args:
        known: fields that the route has itself.
        content: the body.
        title: of the body, for pydantic.

    Raises:
        ValidationError: one of the fields is not off.
    """
    others = {name: OFF[name] for name in content if name in OFF and name not in known}
    wrong = [
        InitErrorDetails(type=refusal(name, allowed), loc=(name,), input=content[name])
        for name, allowed in others.items()
        if not is_off(content[name], allowed)
    ]
    if wrong:
        raise ValidationError.from_exception_data(title, wrong)
    return {name: value for name, value in content.items() if name not in others}


def refusal(name: str, allowed: tuple[Any, ...]) -> PydanticCustomError:
    """Return what is said of a field that is not off."""
    values = " or ".join(map(json.dumps, (None, *allowed)))
    cure = f"; {INSTEAD[name]}" if name in INSTEAD else ""
    said = "is not supported by this server; leave it out or send {values}{cure}"
    return PydanticCustomError("unsupported_value", said, {"values": values, "cure": cure})
