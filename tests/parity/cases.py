"""The table of models on which Hugging Face transformers and this suite have to agree.

Standard library only: both environments import it. Settings are in the spelling of transformers 5
(``rope_parameters``); :func:`version_4_config` rewrites a config.json into the older one.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

NEW_TOKENS = 16
# A greedy choice closer than this could hang on rounding (logits agree within 1e-5): the peer's
# side refuses such seeds.
MIN_MARGIN = 5e-5

_SIZES = {
    "live": {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3},
    "reference": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
}
_HEADS = {"live": (6, 2), "reference": (4, 2)}
_VOCAB = {"live": 320, "reference": 48}
_LENGTH = {"live": 80, "reference": 24}


@dataclass(frozen=True)
class ParityCase:
    """One random model and the inputs on which it is compared."""

    name: str
    config: dict[str, Any]
    seed: int
    length: int
    batch: int = 2
    offset: int = 0  # of the first row's positions; later rows start 37 further each
    dtype: str = "float32"  # of the checkpoint; both sides compute in float32
    max_shard_size: str = "1GB"
    prompts: tuple[int, ...] = (3, 9, 1, 13)
    documents: tuple[int, ...] = (5, 1, 10, 4)

    def as_json(self) -> dict[str, Any]:
        """Return the case as it reads back from JSON."""
        raw = dataclasses.asdict(self)
        return raw | {"prompts": list(self.prompts), "documents": list(self.documents)}


@dataclass(frozen=True)
class _Family:
    name: str
    theta: float = 10000.0
    rope: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    grouped: bool = True
    run: dict[str, Any] = field(default_factory=dict)
    live: dict[str, Any] = field(default_factory=dict)


def _llama3_rope(factor: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _yarn_rope(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}
    return rope | changes


_LONG = {"max_position_embeddings": 131072}
_FAMILIES = [
    _Family("llama-1-mha", changes={"rms_norm_eps": 1e-6}, grouped=False),
    _Family(
        "llama-2-gqa",
        changes={"max_position_embeddings": 4096},
        # Long enough for several tiles of the CPU's attention.
        live={"length": 300, "documents": (100, 1, 130, 40)},
    ),
    _Family(
        "llama-3",
        500000.0,
        changes={"max_position_embeddings": 8192},
        run={"max_shard_size": "30KB", "dtype": "bfloat16"},
    ),
    _Family(
        "llama-3.1-beyond-8192", 500000.0, _llama3_rope(8.0, 8192), _LONG, run={"offset": 9000}
    ),
    _Family(
        "llama-3.1-beyond-100000", 500000.0, _llama3_rope(8.0, 8192), _LONG, run={"offset": 120000}
    ),
    _Family(
        "llama-3.1-short-original",
        rope=_llama3_rope(4.0, 0),
        changes=_LONG,
        run={"max_shard_size": "20KB", "dtype": "float16"},
    ),
    _Family(
        "llama-3.2-tied",
        500000.0,
        _llama3_rope(32.0, 8192),
        _LONG | {"tie_word_embeddings": True},
        run={"offset": 8180},
    ),
    _Family("linear", rope={"rope_type": "linear", "factor": 4.0}),
    _Family("dynamic-ntk", rope={"rope_type": "dynamic", "factor": 2.0}),
    _Family(
        "dynamic-ntk-offset",
        rope={"rope_type": "dynamic", "factor": 4.0},
        run={"offset": 700, "batch": 1},
    ),
    _Family(
        "biases", changes={"attention_bias": True, "mlp_bias": True}, run={"max_shard_size": "50KB"}
    ),
    _Family("wide-heads", changes={"head_dim": 40}),
    # Rows that begin within the original context and end beyond it.
    _Family("yarn", rope=_yarn_rope(), run={"offset": 7}),
    _Family(
        "yarn-attention-factor",
        500000.0,
        _yarn_rope(factor=8.0, attention_factor=0.8, beta_fast=4.0, beta_slow=0.5, truncate=False),
        run={"offset": 130},
    ),
    _Family("yarn-mscale", rope=_yarn_rope(factor=40.0, mscale=0.707, mscale_all_dim=1.0)),
    _Family(
        "linear-beyond",
        rope={"rope_type": "linear", "factor": 4.0},
        changes={"max_position_embeddings": 32},
        run={"offset": 20},
    ),
]
# The middle band of llama3 scaling has to hold a frequency of each set's small heads, and rows
# have to outgrow the original context.
_SHORT_ORIGINAL = {"live": 40, "reference": 100}
_REFERENCE_RUN = {"llama-3.1-short-original": {"offset": 90}}
_REFERENCE_CONFIG = {"wide-heads": {"head_dim": 12}}
_NOT_IN_REFERENCE = (
    *("llama-3.1-beyond-100000", "dynamic-ntk-offset"),
    *("yarn-attention-factor", "yarn-mscale", "linear-beyond"),
)
_TRAINED_OF_DYNAMIC = {"live": 40, "reference": 30}


def _case(family: _Family, kind: str, seed: int) -> ParityCase:
    heads, kv_heads = _HEADS[kind]
    rope = {"rope_theta": family.theta, "rope_type": "default"} | family.rope
    if rope.get("original_max_position_embeddings") == 0:
        rope["original_max_position_embeddings"] = _SHORT_ORIGINAL[kind]
    config = {
        "vocab_size": _VOCAB[kind],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads if family.grouped else heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        **_SIZES[kind],
        **family.changes,
    }
    run: dict[str, Any] = {"length": _LENGTH[kind], **family.run}
    if rope["rope_type"] == "dynamic":
        config["max_position_embeddings"] = _TRAINED_OF_DYNAMIC[kind]
        run["length"] = _TRAINED_OF_DYNAMIC[kind] + 17
    if kind == "live":
        run |= family.live
    else:
        run |= _REFERENCE_RUN.get(family.name, {})
        config |= _REFERENCE_CONFIG.get(family.name, {})
        if family.name != "llama-1-mha":
            run.setdefault("dtype", "bfloat16")  # keeps the committed files small
    return ParityCase(family.name, config, seed, **run)


def cases(kind: str) -> list[ParityCase]:
    """Return the ``live`` cases, or the smaller ``reference`` ones whose results are committed."""
    chosen = [f for f in _FAMILIES if kind == "live" or f.name not in _NOT_IN_REFERENCE]
    return [_case(family, kind, 1000 + number) for number, family in enumerate(chosen)]


def version_4_config(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a config.json of transformers 5 as transformers 4 spelled it."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    old["torch_dtype"] = old.pop("dtype", "float32")
    return old
