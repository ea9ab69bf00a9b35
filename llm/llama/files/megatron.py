"""Megatron's checkpoints: a file for each rank (``mp_rank_XX``), and ``torch_dist`` directories.

Names are those of Megatron-Core (``megatron/core/models/gpt``), with and without Transformer
Engine, and of Megatron-LM's older models. Query, key and value are one matrix, group by group;
gate and up are one matrix of each rank. What is no weight (optimizer, random states, settings as
Python objects) is never loaded.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.config import LlamaConfig, load_config
from llm.llama.files.rank_files import check_ranks
from llm.llama.files.rank_layout import HEAD, ArrayPlan, Part, RankLayout, rank_arrays
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.spare import check_names
from llm.llama.files.tensors import Tensor, put_together
from llm.llama.files.torch_files import TorchTensor, Unnamed, read_pickle, read_torch
from llm.llama.rope_scaling import RopeScaling

LATEST = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
_DIST = ".metadata"
_COMMON = "common.pt"
_ENDS = {
    "llama.embed_tokens.weight": "embedding.word_embeddings.weight",
    "llama.norm.weight": "decoder.final_layernorm.weight",
    HEAD: "output_layer.weight",
}
_LAYER = {
    "self_attn.qkv_proj": "self_attention.linear_qkv",
    "self_attn.o_proj": "self_attention.linear_proj",
    "mlp.gate_up_fused_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}
# Other spellings: Transformer Engine has norms in the linears behind them; older models.
_SPELLINGS = (
    (r"^(module\.)+", ""),
    (r"self_attention\.linear_qkv\.layer_norm_weight", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight", "pre_mlp_layernorm.weight"),
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"self_attention\.query_key_value\.", "self_attention.linear_qkv."),
    (r"self_attention\.dense\.", "self_attention.linear_proj."),
    (r"mlp\.dense_h_to_4h\.", "mlp.linear_fc1."),
    (r"mlp\.dense_4h_to_h\.", "mlp.linear_fc2."),
    (r"\.(input_norm)\.", ".input_layernorm."),
    (r"\.(post_attention_layernorm|post_attention_norm)\.", ".pre_mlp_layernorm."),
    (r"\.final_norm\.", ".final_layernorm."),
)
_IDLE = re.compile(r".*(_extra_state\d*|rotary_pos_emb\.inv_freq|inv_freq)(/.*)?")
# Objects of these may be named in a file; none of them is made.
_KNOWN = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|signal\.Signals|pathlib\..*|megatron\..*"
    r"|transformer_engine\..*|torch\.[a-z]*\d+|torch\.dtype|torch\.distributed\.checkpoint\..*"
    r"|torch\.serialization\._get_layout|torch\.strided|torch\.contiguous_format|torch\.device"
    r"|torch\._utils\._rebuild_device_tensor_from_numpy|enum\..*|io\.BytesIO|_io\.BytesIO"
    r"|numpy\.(dtype|ndarray)|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
    r"|_codecs\.encode|torch\._C\._.*|collections\.(defaultdict|deque)|functools\.partial"
    r"|torch\.nn\.(init|functional)\..*|torch\._utils\._rebuild_tensor)"
)


def _inert(name: str) -> bool:
    return _KNOWN.fullmatch(name) is not None


def iteration_of(directory: Path) -> Path | None:
    """Return where the newest checkpoint of a directory lies; None where it is none of Megatron's.

    Args:
        directory: with ``latest_checkpointed_iteration.txt``, or one iteration's own.
    """
    latest = directory / LATEST
    if latest.is_file():
        said = latest.read_text(encoding="utf-8", errors="replace").strip()
        return directory / (f"iter_{int(said):07}" if said.isdecimal() else said)
    own = (directory / _DIST).is_file() or any(_RANK.fullmatch(p.name) for p in _inside(directory))
    return directory if own else None


def _inside(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def open_megatron(directory: Path) -> tuple[LlamaConfig, dict[str, Tensor], str]:
    """Return architecture, complete tensors, and what the files are.

    Raises:
        UserError: a missing or damaged file, one that would run code, another model than a Llama,
            or tensors that are not those that its settings describe.
    """
    place = iteration_of(directory)
    assert place is not None
    if not place.is_dir():
        raise UserError(f"{directory / LATEST} names {place.name}, which is not there")
    if (place / _DIST).is_file():
        return _open_dist(directory, place)
    return _open_ranks(directory, place)


def _named(name: str) -> str:
    """Return Megatron-Core's name of an array in any spelling."""
    for pattern, meant in _SPELLINGS:
        name = re.sub(pattern, meant, name)
    return name


def megatron_arrays(config: LlamaConfig, ranks: int, rank: int) -> dict[str, ArrayPlan]:
    """Return the arrays of one tensor parallel rank, all stages together, by Megatron-Core's name.

    Matrices are fused and shared out as PaddleNLP's are, and not transposed.
    """
    found = {}
    layout = RankLayout(ranks, 1, fuse_qkv=True, fuse_ffn=True)
    for name, planned in rank_arrays(config, layout, rank).items():
        theirs = _ENDS.get(name)
        if theirs is None:
            _, _, layer, inner = name.split(".", 3)
            inner, _, ending = inner.rpartition(".")
            theirs = f"decoder.layers.{layer}.{_LAYER[inner]}.{ending}"
        found[theirs] = replace(planned, name=theirs, transposed=False)
    if config.tie_word_embeddings:
        del found[_ENDS[HEAD]]
    return found


# A file for each rank


def _open_ranks(directory: Path, place: Path) -> tuple[LlamaConfig, dict[str, Tensor], str]:
    files = _rank_files(place)
    ranks, stages = (1 + max(key[axis] for key in files) for axis in (0, 1))
    settings: Any = None
    arrays: list[dict[str, StoredTensor]] = [{} for _ in range(ranks)]
    for (rank, stage), file in files.items():
        content, locate = read_torch(file, _inert)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            more = isinstance(content, dict) and "model0" in content
            why = "it has interleaved stages (model0)" if more else "it has no entry 'model'"
            raise UserError(f"{file} is not read: {why}; save it from one pipeline chunk per stage")
        settings = content.get("args") if settings is None else settings
        config = _config(directory, place, settings)
        per_stage, left = divmod(config.num_hidden_layers, stages)
        if left:
            raise UserError(
                f"{place}: {stages} pipeline stages do not divide {config.num_hidden_layers} "
                "layers; save it with stages of equal size"
            )
        for name, tensor in _flat(file, content["model"]):
            theirs = _shifted(_named(name), stage * per_stage)
            arrays[rank][theirs] = replace(locate(name, tensor), name=theirs)
    check_ranks(arrays)
    plans = [megatron_arrays(config, ranks, rank) for rank in range(ranks)]
    for found in arrays:
        if config.tie_word_embeddings:
            found.pop(_ENDS[HEAD], None)
    check_names(place, plans[0], arrays[0])
    of = f" of {ranks} tensor parallel ranks"
    said = f"Megatron's files of {ranks} tensor parallel x {stages} pipeline ranks"
    return config, put_together(config, plans, arrays, of), said


def _rank_files(place: Path) -> dict[tuple[int, int], Path]:
    files = {}
    for inside in _inside(place):
        match = _RANK.fullmatch(inside.name)
        if match is None:
            continue
        own = [inside / name for name in RANK_FILES if (inside / name).is_file()]
        if not own:
            raise UserError(f"{inside} lacks {RANK_FILES[0]}")
        files[int(match[1]), int(match[2] or 0)] = own[0]
    if not files:
        raise UserError(f"{place} holds neither mp_rank_00 nor {_DIST}; is it a checkpoint?")
    ranks, stages = (1 + max(key[axis] for key in files) for axis in (0, 1))
    for rank in range(ranks):
        for stage in range(stages):
            if (rank, stage) not in files:
                name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if stages > 1 else "")
                raise UserError(
                    f"{place} lacks {name}: the files are those of {ranks} tensor parallel x "
                    f"{stages} pipeline ranks, and every rank's is needed"
                )
    return files


def _flat(file: Path, entries: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors of nested dictionaries by their joined names."""
    for key, value in entries.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            yield from _flat(file, value, f"{name}.")
        elif _IDLE.fullmatch(name) is None and value is not None:
            if not isinstance(value, TorchTensor):
                raise UserError(f"{file}: {name} is no tensor")
            yield name, value


def _shifted(name: str, layers: int) -> str:
    """Return the name that an array of a stage has in the whole model."""
    return re.sub(
        r"^(decoder\.layers\.)(\d+)", lambda found: f"{found[1]}{int(found[2]) + layers}", name
    )


# torch_dist


def _open_dist(directory: Path, place: Path) -> tuple[LlamaConfig, dict[str, Tensor], str]:
    settings = None
    if (place / _COMMON).is_file():
        content, _ = read_torch(place / _COMMON, _inert)
        settings = content.get("args") if isinstance(content, dict) else None
    config = _config(directory, place, settings)
    whole = megatron_arrays(config, 1, 0)
    plans: dict[str, ArrayPlan] = {}
    arrays: dict[str, StoredTensor] = {}
    seen: dict[str, int] = dict.fromkeys(whole, 0)
    for name, at, file, start, size in _chunks(place):
        content, locate = read_torch(file, _inert, start, size)
        if not isinstance(content, TorchTensor):
            raise UserError(f"{file}: {name} is no tensor")
        stored = locate(name, content)
        theirs, offsets, shape = _of_layer(name, at, stored.shape)
        if theirs not in whole:
            raise UserError(f"{place} has unexpected {theirs}: its settings describe another model")
        key = f"{theirs} at {list(offsets)}"
        plans[key] = _piece(whole[theirs], key, offsets, shape)
        arrays[key] = replace(stored, name=key, shape=shape)
        seen[theirs] += _count(shape)
    for name, planned in whole.items():
        if seen[name] != _count(planned.shape):
            what = "lacks" if not seen[name] else "holds a part only of"
            raise UserError(f"{place} {what} {name}, which the model's settings describe")
    return config, put_together(config, [plans], [arrays]), "Megatron's torch_dist files"


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def _chunks(place: Path) -> Iterator[tuple[str, tuple[int, ...], Path, int, int]]:
    """Yield name, offset, file and place in it of each stored piece of a weight."""
    said = read_pickle(place / _DIST, _inert)
    storage = getattr(said, "storage_data", None)
    if not isinstance(storage, dict):
        raise UserError(f"{place / _DIST} is not the metadata of torch.distributed.checkpoint")
    for index, where in storage.items():
        name, offset = getattr(index, "fqn", None), getattr(index, "offset", None)
        numbers = [getattr(where, key, None) for key in ("offset", "length")]
        file = getattr(where, "relative_path", None)
        if not isinstance(name, str) or not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{place / _DIST} is damaged: a piece has no name or file")
        if offset is None or (not name.startswith("model.") and "optimizer" in name):
            continue
        name = name.removeprefix("model.")
        if _IDLE.fullmatch(name) or name.startswith(("optimizer.", "rng_state", "rerun_state")):
            continue
        if any(type(number) is not int or number < 0 for number in numbers):
            raise UserError(f"{place / _DIST} is damaged: {name} lies at {numbers}")
        yield name, tuple(offset), place / file, *numbers


def _of_layer(
    name: str, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Take the number of the layer, which may be the first axis, into the name."""
    name = _named(name)
    if name.startswith("decoder.layers.") and not name.split(".")[2].isdecimal():
        layers, inner = "decoder.layers.", name.removeprefix("decoder.layers.")
        if len(offsets) < 2 or shape[0] != 1:
            raise UserError(f"{name} has the shape {list(shape)}, which is not of one layer")
        return f"{layers}{offsets[0]}.{inner}", offsets[1:], shape[1:]
    return name, offsets, shape


def _piece(
    planned: ArrayPlan, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> ArrayPlan:
    """Return what a rectangle of a planned array holds of each tensor."""
    first, left = offsets[0], offsets[1] if len(offsets) > 1 else 0
    height, width = shape[0], shape[1] if len(shape) > 1 else 1
    parts = []
    for part in planned.parts:
        top = max(part.top, first)
        bottom = min(part.top + len(part.rows), first + height)
        if top < bottom:
            start = part.rows.start + top - part.top
            rows = range(start, start + bottom - top)
            cols = range(part.cols.start + left, part.cols.start + left + width)
            parts.append(Part(part.tensor, rows, cols, top - first))
    return replace(planned, name=name, parts=tuple(parts))


# Settings


def _config(directory: Path, place: Path, settings: Any) -> LlamaConfig:
    """Return the architecture: that of a config.json beside the files, or of their settings."""
    for one in (directory, place):
        if (one / "config.json").is_file():
            return load_config(one)
    said = vars(settings) if isinstance(settings, Unnamed) else settings
    if not isinstance(said, dict) or "num_layers" not in said:
        raise UserError(
            f"{place} does not say what model it is of (args); put the model's config.json beside "
            f"it: {directory / 'config.json'}"
        )
    for key, wanted in (("normalization", "RMSNorm"), ("swiglu", True), ("num_experts", None)):
        if said.get(key, wanted) != wanted:
            raise UserError(f"{place}: {key}={said[key]!r} is of no Llama, which has {wanted!r}")
    if said.get("position_embedding_type", "rope") != "rope" or said.get("rotary_percent", 1) != 1:
        raise UserError(f"{place}: its positions are not rotated as in a Llama")
    heads = said["num_attention_heads"]
    groups = said.get("num_query_groups") if said.get("group_query_attention") else None
    bias = bool(said.get("add_bias_linear", False))
    scaling = RopeScaling()
    if said.get("use_rope_scaling"):
        scaling = RopeScaling("llama3", float(said.get("rope_scaling_factor") or 8.0))
    return LlamaConfig(
        vocab_size=said.get("padded_vocab_size") or said.get("vocab_size"),
        hidden_size=said["hidden_size"],
        intermediate_size=said.get("ffn_hidden_size"),
        num_hidden_layers=said["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups or heads,
        max_position_embeddings=said.get("max_position_embeddings", 2048),
        head_dim=said.get("kv_channels") or 0,
        rms_norm_eps=said.get("norm_epsilon", said.get("layernorm_epsilon", 1e-5)),
        rope_theta=float(said.get("rotary_base", 10000)),
        rope_scaling=scaling,
        tie_word_embeddings=not said.get("untie_embeddings_and_output_weights", False),
        attention_bias=bias,
        mlp_bias=bias,
    )
