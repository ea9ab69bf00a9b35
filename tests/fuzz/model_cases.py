"""Random model directories: a tiny Llama, and a few changes to its config and its tensors."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCAB, HIDDEN, FFN = 24, 16, 20
LENGTH = 14
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]
Change = Callable[[random.Random, Config, Tensors], None]


def base(rng: random.Random) -> tuple[Config, Tensors]:
    """Return a Llama of random shape and spelling; nothing is wrong with it."""
    heads, groups = rng.choice([(4, 4), (4, 2), (4, 1), (2, 2)])
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": rng.choice([1, 1, 1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": rng.choice([8, 12, 64]),
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "rope_theta": rng.choice([10000.0, 500000.0, 100.0]),
        "tie_word_embeddings": rng.random() < 0.3,
        "hidden_act": "silu",
    }
    if rng.random() < 0.2:
        config["head_dim"] = rng.choice([4, 8, 6])
    for key in ("attention_bias", "mlp_bias"):
        if rng.random() < 0.2:
            config[key] = rng.random() < 0.7
    return config, _tensors(rng, config)


def _tensors(rng: random.Random, config: Config) -> Tensors:
    numbers = np.random.default_rng(rng.getrandbits(32))
    size = config.get("head_dim", HIDDEN // config["num_attention_heads"])
    q, kv = (config[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    attention = {"q_proj": (q, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN)}
    attention["o_proj"] = (HIDDEN, q)
    mlp = {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        for room, linears in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in linears.items():
                shapes[f"{place}.{room}.{name}.weight"] = shape
                if config.get("attention_bias" if room == "self_attn" else "mlp_bias"):
                    shapes[f"{place}.{room}.{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{place}.{norm}.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    made = {}
    for name, shape in shapes.items():
        values = numbers.standard_normal(shape)
        values = 1 + 0.2 * values if "norm" in name else values / np.sqrt(shape[-1])
        made[name] = values.astype(np.float32)
    return made


ODD = (None, 0, 1, -1, 2, 3, 0.5, 1e9, True, False, "", "1", "silu", [], {}, [1], float("inf"))
ROPE_VALUES: dict[str, tuple[Any, ...]] = {
    "factor": (1.0, 2.0, 3.3, 4, 8.0, 0.5, None, "2"),
    "low_freq_factor": (1.0, 0.5, 1, 4.0),
    "high_freq_factor": (4.0, 2.0, 1.0),
    "original_max_position_embeddings": (4, 8, 16, 8192, 6.5, None),
    "attention_factor": (None, 1.0, 0.7, 1.3, 1, 0.0, -1.0),
    "beta_fast": (None, 32, 4.0, 0.3, 0),
    "beta_slow": (None, 1, 0.1, 2.0, 0),
    "mscale": (None, 0.7, 1.0, 0),
    "mscale_all_dim": (None, 0.7, 1.0, 0),
    "truncate": (True, False),
    "rope_theta": (10000.0, 500.0, 1e6, None, 1.0),
    "partial_rotary_factor": (1.0, 0.5, None),
    "short_factor": ([1.0, 1.0],),
    "type": ("linear", "default", "dynamic"),
    "anything": (1,),
}
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor"),
    "proportional": (),
    "mrope": (),
}


def _rope(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice([*list(ROPE_NEEDS)[:5] * 3, *ROPE_NEEDS])
    section: dict[str, Any] = {rng.choice(["rope_type", "rope_type", "type"]): kind}
    for key in ROPE_NEEDS[kind]:
        if rng.random() < 0.95:
            values = ROPE_VALUES[key]
            section[key] = rng.choice(values if rng.random() < 0.2 else values[:3])
    for key in rng.sample(list(ROPE_VALUES), rng.choice([0, 0, 1, 2])):
        section[key] = rng.choice(ROPE_VALUES[key])
    return section


def _set_rope(rng: random.Random, config: Config, _: Tensors) -> None:
    config[rng.choice(["rope_scaling", "rope_parameters"])] = _rope(rng)
    if rng.random() < 0.15:
        other = config.get("rope_scaling")
        same = isinstance(other, dict) and rng.random() < 0.5
        config["rope_parameters"] = dict(other) if same else _rope(rng)
    if rng.random() < 0.15:
        config.pop("rope_theta", None)
    if rng.random() < 0.1:
        config["original_max_position_embeddings"] = rng.choice([4, 8, 32])
    if rng.random() < 0.05:
        config["partial_rotary_factor"] = rng.choice([0.5, 1.0, None])


FIELD_KEYS: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None, 4, 0),
    "use_sliding_window": (False, True),
    "layer_types": (None, ["full_attention"], ["sliding_attention"]),
    "attn_logit_softcapping": (None, 30.0),
    "final_logit_softcapping": (None, 5.0),
    "logit_scale": (1, 0.1),
    "embedding_multiplier": (1.0, 12.0),
    "residual_multiplier": (0.2, 1),
    "query_pre_attn_scalar": (None, 8),
    "num_local_experts": (0, 4),
    "qk_norm": (False, True),
    "clip_qkv": (None, 1.0),
    "no_rope_layers": ([], [1, 0]),
    "rope_interleaved": (False, True),
    "pruned_heads": ({}, {"0": [1]}),
    "pretraining_tp": (1, 2),
    "attention_dropout": (0.0, 0.5),
    "torch_dtype": ("float16", "float32", "int8", None),
    "dtype": ("bfloat16", "float32"),
    "use_cache": (True, False),
    "auto_map": ({"AutoModelForCausalLM": "modeling.Other"}, {}),
    "architectures": (["LlamaForSequenceClassification"], ["LlamaModel"], ["Other"], None, []),
    "quantization_config": (None, {}, {"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}),
    "is_decoder": (True, False),
    "add_cross_attention": (False, True),
    "is_encoder_decoder": (False, True),
    "initializer_range": (0.02, 0.5),
    "id2label": ({"0": "a"},),
    "num_labels": (3,),
    "problem_type": ("regression",),
    "text_config": ({}, {"hidden_size": 8}),
    "transformers_version": ("4.30.0", "5.0.0"),
    "anything": (1, "x", [1], {"a": 1}),
    "eos_token_id": (2, [2, 3], None),
    "bos_token_id": (1, None),
    "pad_token_id": (None, 0, -1, VOCAB),
    "hidden_act": ("silu", "swish", "gelu", "relu", None),
    "model_type": ("llama", "mistral", "qwen2", ""),
}
SIZE_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim"),
)
OTHER_KEYS = ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "attention_bias", "mlp_bias")


def _set_field_key(rng: random.Random, config: Config, _: Tensors) -> None:
    key = rng.choice(list(FIELD_KEYS))
    config[key] = rng.choice(FIELD_KEYS[key])


def _set_size(rng: random.Random, config: Config, _: Tensors) -> None:
    key = rng.choice(SIZE_KEYS)
    now = config.get(key)
    near = [now * 2, now // 2, now + 1, now - 1] if isinstance(now, int) else [2, 4, 8]
    config[key] = rng.choice([*near, rng.choice([1, 2, 3, 4, 8])])


def _set_odd(rng: random.Random, config: Config, _: Tensors) -> None:
    config[rng.choice([*SIZE_KEYS, *OTHER_KEYS, *FIELD_KEYS, "rope_scaling"])] = rng.choice(ODD)


def _set_other(rng: random.Random, config: Config, _: Tensors) -> None:
    key = rng.choice(OTHER_KEYS)
    values = (1e-6, 1e-3, 0.1) if key == "rms_norm_eps" else (True, False)
    config[key] = rng.choice((100.0, 1e6, 10000) if key == "rope_theta" else values)


def _drop_key(rng: random.Random, config: Config, _: Tensors) -> None:
    config.pop(rng.choice(list(config)))


CONFIG_CHANGES: tuple[Change, ...] = (
    *(_set_rope, _set_rope, _set_rope, _set_field_key, _set_field_key),
    *(_set_size, _set_odd, _set_other, _drop_key),
)


def _drop(rng: random.Random, _: Config, tensors: Tensors) -> None:
    tensors.pop(rng.choice(list(tensors)))


def _add(rng: random.Random, _: Config, tensors: Tensors) -> None:
    like = rng.choice(list(tensors.values()))
    layer = rng.randrange(2)
    name = rng.choice(
        [
            *("lm_head.weight", "lm_head.bias", "score.weight", "v_head.summary.weight"),
            *("model.rotary_emb.inv_freq", "model.norm.bias", "model.embed_positions.weight"),
            f"model.layers.{layer + 1}.input_layernorm.weight",
            f"model.layers.{layer}.self_attn.q_norm.weight",
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq",
            f"model.layers.{layer}.self_attn.{rng.choice('qkvo')}_proj.bias",
            f"model.layers.{layer}.mlp.{rng.choice(['up', 'down'])}_proj.bias",
            f"model.layers.{layer}.mlp.up_proj.weight_scale",
            f"module.{rng.choice(list(tensors))}",
        ]
    )
    if name == "lm_head.weight":
        embedding = tensors.get("model.embed_tokens.weight", like)
        like = embedding if rng.random() < 0.4 else embedding[::-1].copy()
    if name.endswith(".bias"):
        like = like.reshape(-1)[:HIDDEN].copy()
    tensors[name] = like


def _rename(rng: random.Random, _: Config, tensors: Tensors) -> None:
    one, other = rng.sample(list(tensors), 2)
    how = rng.randrange(4)
    if how == 0:
        tensors[one], tensors[other] = tensors[other], tensors[one]
    elif how == 1:
        tensors[one.replace("model.", rng.choice(["", "llama.", "model.model."]), 1)] = tensors.pop(
            one
        )
    elif how == 2:
        tensors[one.upper()] = tensors.pop(one)
    else:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)


def _reshape(rng: random.Random, _: Config, tensors: Tensors) -> None:
    name = rng.choice(list(tensors))
    values = tensors[name]
    tensors[name] = rng.choice(
        [
            values.T.copy(),
            values[:-1].copy(),
            values[None].copy(),
            values.reshape(-1).copy(),
            np.concatenate([values, values[:1]]),
            values[::-1].copy(),
            np.roll(values, 1, -1).copy(),
        ]
    )


def _retype(rng: random.Random, _: Config, tensors: Tensors) -> None:
    kinds = [np.float16, np.float16, ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.float64, np.int8]
    kind = rng.choice([*kinds, np.int64, np.bool_, ml_dtypes.float8_e4m3fn])
    names = list(tensors) if rng.random() < 0.4 else rng.sample(list(tensors), 1)
    for name in names:
        with np.errstate(all="ignore"):
            tensors[name] = tensors[name].astype(kind)


def _spoil(rng: random.Random, _: Config, tensors: Tensors) -> None:
    name = rng.choice(list(tensors))
    values = tensors[name].astype(rng.choice([np.float32, np.float64])).copy()
    flat = values.reshape(-1)
    flat[rng.randrange(max(1, flat.size))] = rng.choice(
        [np.nan, np.inf, -np.inf, 1e300 if values.dtype == np.float64 else 300.0, 0.0, 50.0]
    )
    tensors[name] = values


TENSOR_CHANGES: tuple[Change, ...] = (_drop, _add, _add, _rename, _reshape, _retype, _spoil)


def write(seed: int, directory: Path) -> list[int]:
    """Write the directory of a seed; returns a row of ids that its vocabulary has."""
    rng = random.Random(seed)
    config, tensors = base(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])):
        changes = CONFIG_CHANGES if rng.random() < 0.6 or not tensors else TENSOR_CHANGES
        rng.choice(changes)(rng, config, tensors)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_files(rng, directory, tensors)
    vocab = config.get("vocab_size")
    top = min(VOCAB, vocab) if type(vocab) is int and vocab > 0 else VOCAB
    return [rng.randrange(top) for _ in range(LENGTH)]


def _write_files(rng: random.Random, directory: Path, tensors: Tensors) -> None:
    if rng.random() < 0.7:
        save_file(tensors, directory / SINGLE, {"format": "pt"})
        return
    names = sorted(tensors, key=lambda _: rng.random())
    cut = rng.randrange(len(names) + 1)
    where: dict[str, str] = {}
    shards = [{n: tensors[n] for n in part} for part in (names[:cut], names[cut:])]
    for number, shard in enumerate(shards, 1):
        where |= dict.fromkeys(shard, f"model-{number:05}-of-00002.safetensors")
    how = rng.random()
    if how < 0.15:  # a copy in the other shard, of which the index says nothing
        name = rng.choice(names)
        shards[rng.randrange(2)].setdefault(name, tensors[name][::-1].copy())
    elif how < 0.3:  # the index forgets one
        where.pop(rng.choice(names))
    elif how < 0.4:  # the index names the wrong file
        name = rng.choice(names)
        where[name] = rng.choice(list(where.values()))
    elif how < 0.5:  # another model of one file beside it
        save_file({n: v[::-1].copy() for n, v in tensors.items()}, directory / SINGLE)
    for number, shard in enumerate(shards, 1):
        save_file(shard, directory / f"model-{number:05}-of-00002.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")
