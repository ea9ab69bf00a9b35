"""The table of adapters on which Hugging Face PEFT and this suite have to agree.

Standard library only: both environments import it. Options are PEFT's own.
"""

from typing import Any

_CONFIG = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_LLAMA_3 = _CONFIG | {"tie_word_embeddings": True, "head_dim": 12}
_BIASES = _CONFIG | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}


def _case(
    kind: str,
    options: dict[str, Any],
    config: dict[str, Any] = _CONFIG,
    rate: float = 2e-3,
    seed: int = 0,
    faster: float = 1.0,
) -> dict[str, Any]:
    return {
        "kind": kind,
        "options": options,
        "config": config,
        "steps": 20,
        "rate": rate,
        "seed": seed,
        "faster": faster,  # LoRA+
    }


LORA = {
    "all-linear": _case("lora", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "rslora with biases": _case(
        "lora",
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        _BIASES,
    ),
    "patterns, tied": _case(
        "lora",
        {
            "r": 4,
            "target_modules": r".*layers\.\d\.(self_attn|mlp)\..*_proj",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"layers.1.*up_proj": 5},
            "exclude_modules": ["o_proj"],
        },
        _LLAMA_3,
    ),
    "lm_head": _case("lora", {"r": 2, "target_modules": ["lm_head", "down_proj", "k_proj"]}),
    "dora, faster B": _case(
        "lora",
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "all-linear"},
        _BIASES,
        faster=4.0,
    ),
    "pissa": _case(
        "lora", {"r": 4, "init_lora_weights": "pissa", "target_modules": "all-linear"}, rate=1e-3
    ),
    "dora on pissa": _case(
        "lora",
        {
            "r": 4,
            "lora_alpha": 4,
            "init_lora_weights": "pissa",
            "use_dora": True,
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj", "down_proj"],
        },
        _LLAMA_3,
        rate=1e-3,
    ),
    "whole layers": _case(
        "lora",
        {
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["embed_tokens", "lm_head", "norm", "1.mlp.up_proj"],
        },
        rate=1e-3,
    ),
    "whole embedding, tied": _case(
        "lora",
        {
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        _LLAMA_3,
        rate=1e-3,
    ),
}
PREFIX = {
    f"prefix of {length}{', projected' * projection}{', ' * bool(more) + more}": _case(
        "prefix",
        {
            "num_virtual_tokens": length,
            "prefix_projection": projection,
            **({"encoder_hidden_size": 20} if projection else {}),
        },
        config,
        rate=3e-3 if projection else 1e-2,
    )
    for length, projection, config, more in (
        (7, False, _CONFIG, ""),
        (16, True, _CONFIG, ""),
        (1, False, _BIASES, "all heads"),
        (20, True, _LLAMA_3, "wide heads"),
    )
}
LIVE = LORA | PREFIX

_SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
REFERENCE = {
    "small-all-linear": _case(
        "lora",
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
        _SMALL,
        rate=3e-3,
    ),
    "small-projected-prefix": _case(
        "prefix",
        {"num_virtual_tokens": 6, "prefix_projection": True, "encoder_hidden_size": 12},
        _SMALL,
        rate=3e-3,
    ),
}
