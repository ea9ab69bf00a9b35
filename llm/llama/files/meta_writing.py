"""Meta's layout, laid out before any number is moved; :mod:`llm.llama.files.meta` reads it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.config import LlamaConfig
from llm.llama.files.meta import PARAMS_NAME, MetaForm, file_name, meta_arrays, meta_name
from llm.llama.files.rank_layout import EMBEDDING, HEAD, part_of, tensor_shapes
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.target import Plan
from llm.llama.files.torch_writing import plan_torch


def plan_meta(
    directory: Path, config: LlamaConfig, types: Mapping[str, str], form: MetaForm
) -> Plan:
    """Lay out a release: a file for each process, and ``params.json``.

    Args:
        directory: where the files are going to be.
        config: of the model.
        types: header's name of the type of each tensor.
        form: how many processes, and what each holds of the embedding.

    Raises:
        UserError: a model that Meta's code does not compute, or that so many cannot share.
    """
    params = params_of(config)
    sizes = {
        name: getattr(config, name)
        for name in ("num_key_value_heads", "intermediate_size", "vocab_size", "hidden_size")
    }
    for name, size in sizes.items():
        if size % form.processes:
            raise UserError(
                f"tensor_parallel_degree={form.processes} does not divide the model's "
                f"{name}={size}; choose a degree that does"
            )
    plan = Plan()
    for rank in range(form.processes):
        arrays, path = meta_arrays(config, form, rank), directory / file_name(rank)
        kinds = {name: types[planned.parts[0].tensor] for name, planned in arrays.items()}
        if config.tie_word_embeddings:  # Meta's code reads the output matrix in any case
            copy = replace(arrays[meta_name(EMBEDDING)], name=meta_name(HEAD))
            shape = tensor_shapes(config)[EMBEDDING]
            part = part_of(config, EMBEDDING, shape, form.processes, rank)
            arrays[copy.name] = replace(copy, parts=(part,))
            kinds[copy.name] = kinds[meta_name(EMBEDDING)]
        shapes = {name: (planned.shape, kinds[name]) for name, planned in arrays.items()}
        file, offsets = plan_torch(path, shapes)
        for name, planned in arrays.items():
            stored = StoredTensor(path, name, kinds[name], planned.shape, offsets[name])
            plan.add(stored, planned)
        plan.files.append(file)
    plan.documents[PARAMS_NAME] = params
    return plan


def params_of(config: LlamaConfig) -> dict[str, Any]:
    """Return ``params.json`` of a model.

    Raises:
        UserError: what Meta's code does not compute.
    """
    scaling = config.rope_scaling
    if scaling.rope_type not in ("default", "llama3"):
        raise UserError(f"Meta's code has no {scaling.rope_type} rotary scaling")
    if config.attention_bias or config.mlp_bias:
        raise UserError("Meta's code has no biases (attention_bias, mlp_bias)")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"head_dim={config.head_dim} is not hidden_size / num_attention_heads, as Meta's code "
            "has it"
        )
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        **_feed_forward(config),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_seq_len": config.max_position_embeddings,
    }
    if scaling.rope_type == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": scaling.factor}
        params["rope_high_freq_factor"] = scaling.high_freq_factor
    return params


def _feed_forward(config: LlamaConfig) -> dict[str, Any]:
    """Return by what Meta's code comes to the width: a multiple of 2/3 of four times the input."""
    size, usual = config.intermediate_size, int(2 * 4 * config.hidden_size / 3)
    multiple = next((n for n in (256, 1024, 4096) if -(-usual // n) * n == size), None)
    if multiple is not None:
        return {"multiple_of": multiple}
    return {"multiple_of": 1, "ffn_dim_multiplier": (size + 0.5) / usual}
