"""Keys of config.json that a LlamaConfig has no field for, and what becomes of each.

Three kinds. Keys that would make the network another function are refused, unless they hold the
value at which they change nothing. Keys that change nothing that is computed here are passed over.
All others are named in one line, so that nothing is dropped without a word.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from common.errors import UserError

_OFF = (None, False, 0)
_ONE = (None, 1)

# Key to the values at which Llama's function stays what it is; other families, and Llamas with code
# of their own, compute something else with it. transformers' Llama has no code for any of them.
_CHANGES: dict[str, tuple[Any, ...]] = {
    # attention
    "sliding_window": _OFF,
    "attention_chunk_size": _OFF,
    "attn_logit_softcapping": _OFF,
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "use_qk_norm": _OFF,
    "qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "clip_qkv": _OFF,
    "qkv_clip": _OFF,
    "alibi": _OFF,
    "attention_sinks": _OFF,
    "no_rope_layers": (*_OFF, []),
    "no_rope_layer_interval": _OFF,
    "add_cross_attention": _OFF,
    "is_encoder_decoder": _OFF,
    # rotary embedding
    "rotary_pct": _ONE,
    "rotary_emb_fraction": _ONE,
    "rotary_dim": (None,),
    "rope_interleaved": _OFF,
    "rope_interleave": _OFF,
    "rope_local_base_freq": (None,),
    "rope_ratio": _ONE,
    "rope_scaling_type": (None,),  # PaddleNLP's older form
    "rope_scaling_factor": _ONE,
    # multipliers
    "embedding_multiplier": _ONE,
    "scale_emb": _ONE,
    "residual_multiplier": _ONE,
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "logits_scaling": _ONE,
    "logit_scale": _ONE,
    "final_logit_softcapping": _OFF,
    # layers
    "hidden_activation": (None, "silu", "swish"),
    "pruned_heads": (None, {}, []),
    "num_local_experts": (*_OFF, 1),
    "num_experts": (*_OFF, 1),
    "n_routed_experts": (*_OFF, 1),
    "moe_num_experts": (*_OFF, 1),
    "use_parallel_residual": _OFF,
    "parallel_attn": _OFF,
    "norm_type": (None, "rmsnorm", "rms_norm", "RMSNorm"),
    # models around the language model, and formats of weights
    "text_config": (None, {}),
    "vision_config": (None, {}),
    "audio_config": (None, {}),
    "compression_config": (None, {}),
}
_CURES = {
    "rope_scaling_type": "; write it as Hugging Face's rope_scaling",
    "rope_scaling_factor": "; write it as Hugging Face's rope_scaling",
    "compression_config": "; write it as quantization_config",
}
# Read by others of this suite, or bookkeeping of transformers, PaddleNLP, unsloth and the like.
_PASSED = frozenset(
    (
        *("architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version"),
        *("torch_dtype", "dtype", "use_cache", "pretraining_tp", "hidden_act", "rope_parameters"),
        *("rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"),
        *("quantization_config", "tokenizer_class", "_commit_hash", "_attn_implementation"),
        *("attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
        *("return_dict", "output_hidden_states", "output_attentions", "torchscript"),
        *(
            "use_bfloat16",
            "tf_legacy_loss",
            "chunk_size_feed_forward",
            "is_decoder",
            "cross_attention_hidden_size",
        ),
        *("tie_encoder_decoder", "finetuning_task", "id2label", "label2id", "num_labels"),
        *("task_specific_params", "problem_type", "prefix", "sep_token_id", "unk_token_id"),
        *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "remove_invalid_values"),
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "top_k", "top_p"),
        *("num_beam_groups", "diversity_penalty", "temperature", "typical_p", "length_penalty"),
        *("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("num_return_sequences", "output_scores", "return_dict_in_generate"),
        *("exponential_decay_length_penalty", "max_sequence_length", "model_max_length"),
        *("unsloth_fixed", "unsloth_version", "paddlenlp_version", "tensor_parallel_degree"),
        *("fuse_attention_qkv", "fuse_attention_ffn", "keys_to_ignore_at_inference"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"),
        *("ignore_index"),
    )
)
_TRAINS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")


def _holds(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value == one for one in allowed)


def check_keys(raw: Mapping[str, Any], known: Iterable[str], source: str) -> list[str]:
    """Refuse keys with which the network would be another function.

    Args:
        raw: config.json.
        known: keys that were read.
        source: named in messages.

    Returns:
        What to say: a sentence each, of keys that were passed over and might matter to somebody.

    Raises:
        UserError: names key and value.
    """
    for key, allowed in _CHANGES.items():
        idle = key == "sliding_window" and raw.get("use_sliding_window") is False
        if key in raw and not idle and not _holds(raw[key], allowed):
            raise UserError(
                f"{source}: {key}={raw[key]!r} makes another function of the model than Llama's, "
                f"which has no {key}{_CURES.get(key, '')}"
            )
    _check_layer_types(raw, source)
    said = []
    if raw.get("auto_map"):
        said.append("its own code (auto_map) is not run: what is computed is Llama")
    for key in _TRAINS:
        if raw.get(key):
            said.append(f"{key}={raw[key]} is not applied in training")
    handled = {*known, *_CHANGES, *_PASSED, *_TRAINS, "auto_map", "use_sliding_window"}
    handled |= {"max_window_layers", "layer_types"}
    if unknown := sorted(key for key in raw if key not in handled):
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if unknown[8:] else "")
        said.append(f"{len(unknown)} keys mean nothing here and are passed over: {shown}")
    return said


def _check_layer_types(raw: Mapping[str, Any], source: str) -> None:
    kinds = raw.get("layer_types")
    if kinds and (not isinstance(kinds, list) or set(map(str, kinds)) != {"full_attention"}):
        raise UserError(
            f"{source}: layer_types={kinds!r}: every layer of a Llama attends to all tokens before "
            "(full_attention)"
        )
