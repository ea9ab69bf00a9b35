"""Megatron's rank files, laid out before any number is moved.

Names are Megatron-Core's with Transformer Engine, which Megatron-LM trains with unless it is told
otherwise; :mod:`llm.llama.files.megatron` reads them, and others.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.config import LlamaConfig
from llm.llama.files.megatron import LATEST, RANK_FILES, megatron_arrays
from llm.llama.files.rank_layout import (
    EMBEDDING,
    ArrayPlan,
    RankLayout,
    part_of,
    tensor_shapes,
)
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.target import Plan, check_degrees
from llm.llama.files.torch_writing import plan_torch

_RELEASE = "release"  # what Megatron calls an iteration that no training has made
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_IN_LINEARS = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)


@dataclass(frozen=True)
class MegatronForm:
    """How Megatron's ranks share out a model.

    Attributes:
        tensor: tensor parallel ranks.
        pipeline: stages, of as many layers each.
    """

    tensor: int = 1
    pipeline: int = 1


def plan_megatron(
    directory: Path, config: LlamaConfig, types: Mapping[str, str], form: MegatronForm
) -> Plan:
    """Lay out a file for every tensor and pipeline parallel rank.

    Args:
        directory: where the files are going to be.
        config: of the model.
        types: header's name of the type of each tensor.
        form: the degrees.

    Raises:
        UserError: a model that Megatron's settings cannot say, or degrees that do not fit.
    """
    check_degrees(config, RankLayout(form.tensor, form.pipeline))
    if config.num_hidden_layers % form.pipeline:
        raise UserError(
            f"pipeline_parallel_degree={form.pipeline} does not divide the model's "
            f"num_hidden_layers={config.num_hidden_layers}; choose a degree that does"
        )
    if config.vocab_size % form.tensor:
        padded = -(-config.vocab_size // form.tensor) * form.tensor
        raise UserError(
            f"tensor_parallel_degree={form.tensor} does not divide the vocabulary of "
            f"{config.vocab_size}; add --vocab_size {padded}"
        )
    settings, plan = _settings(config, types, form), Plan()
    for rank in range(form.tensor):
        arrays = megatron_arrays(config, form.tensor, rank)
        for stage in range(form.pipeline):
            name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if form.pipeline > 1 else "")
            path = directory / _RELEASE / name / RANK_FILES[0]
            here = _of_stage(config, arrays, form, rank, stage)
            kinds = {n: types[planned.parts[0].tensor] for n, planned in here.items()}
            shapes = {n: (planned.shape, kinds[n]) for n, planned in here.items()}
            file, offsets = plan_torch(path, shapes, settings)
            for key, planned in here.items():
                plan.add(StoredTensor(path, key, kinds[key], planned.shape, offsets[key]), planned)
            plan.files.append(file)
    plan.documents[LATEST] = _RELEASE
    return plan


def _of_stage(
    config: LlamaConfig,
    arrays: Mapping[str, ArrayPlan],
    form: MegatronForm,
    rank: int,
    stage: int,
) -> dict[str, ArrayPlan]:
    """Return the arrays of a stage, whose layers are counted from 0."""
    each, last = config.num_hidden_layers // form.pipeline, form.pipeline - 1
    found = {}
    for name, planned in arrays.items():
        layer = re.match(r"decoder\.layers\.(\d+)(\..+)", name)
        if layer is None:
            if stage == (0 if name == _EMBEDDING else last):
                found[name] = planned
        elif int(layer[1]) // each == stage:
            inner = layer[2]
            for plain, inside in _IN_LINEARS:
                inner = inside if inner == plain else inner
            found[f"decoder.layers.{int(layer[1]) % each}{inner}"] = planned
    if config.tie_word_embeddings and stage == last > 0:  # it cannot reach the first stage's
        part = part_of(config, EMBEDDING, tensor_shapes(config)[EMBEDDING], form.tensor, rank)
        found[_HEAD] = ArrayPlan(_HEAD, (part,), False)
    return found


def _settings(config: LlamaConfig, types: Mapping[str, str], form: MegatronForm) -> dict[str, Any]:
    """Return ``args`` as Megatron-LM's ``--use-checkpoint-args`` reads them.

    Raises:
        UserError: what they cannot say.
    """
    scaling = config.rope_scaling
    if scaling.rope_type not in ("default", "llama3"):
        raise UserError(f"Megatron's settings have no {scaling.rope_type} rotary scaling")
    if config.attention_bias != config.mlp_bias:
        raise UserError("Megatron's settings have biases everywhere or nowhere (add_bias_linear)")
    if set(types.values()) - {"F32", "F16", "BF16"}:
        raise UserError("Megatron's files have no float64; give --dtype float32")
    kinds = set(types.values())
    scaled = {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "padded_vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "rotary_base": config.rope_theta,
        "rotary_percent": 1.0,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": config.mlp_bias,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "tensor_model_parallel_size": form.tensor,
        "pipeline_model_parallel_size": form.pipeline,
        "fp16": kinds == {"F16"},
        "bf16": kinds == {"BF16"},
        **(scaled if scaling.rope_type == "llama3" else {}),
    }
