"""Meta's releases: ``params.json`` and ``consolidated.00.pth``, a file for each of their processes.

Names and shares are those of ``llama/model.py`` (facebookresearch/llama, meta-llama/llama3); the
rows of query and key matrices stand as llama.cpp's do, neighbouring channels rotated together.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.config import PRESETS, LlamaConfig, read_json
from llm.llama.files.rank_files import check_ranks
from llm.llama.files.rank_layout import (
    EMBEDDING,
    HEAD,
    NORM,
    ArrayPlan,
    Part,
    extent,
    interleaved_rows,
    part_of,
    share,
    tensor_shapes,
)
from llm.llama.files.safetensors import StoredTensor
from llm.llama.files.spare import check_names, same
from llm.llama.files.tensors import Tensor, put_together
from llm.llama.files.torch_files import read_state_dict
from llm.llama.rope_scaling import RopeScaling

PARAMS_NAME = "params.json"
_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
_ENDS = {EMBEDDING: "tok_embeddings", NORM: "norm", HEAD: "output"}
_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WANTED = ("dim", "n_layers", "n_heads")
_LLAMA3_VOCABULARY = 128256
_SCALED_CONTEXT = 131072


@dataclass(frozen=True)
class MetaForm:
    """How a release shares out a model.

    Attributes:
        processes: and files.
        by_token: each holds some rows of the embedding, as in Llama 3; else some columns.
    """

    processes: int
    by_token: bool = True


def is_meta(directory: Path) -> bool:
    """Whether a directory holds a release of Meta's."""
    return any(_FILE.fullmatch(file.name) for file in directory.glob("consolidated.*.pth"))


def file_name(rank: int) -> str:
    """Return the file of a process."""
    return f"consolidated.{rank:02}.pth"


def meta_name(name: str) -> str:
    """Return Meta's name of one of Hugging Face's tensors."""
    if name in _ENDS:
        return f"{_ENDS[name]}.weight"
    _, _, layer, inner = name.split(".", 3)
    inner, _, ending = inner.rpartition(".")
    return f"layers.{layer}.{_LAYER[inner]}.{ending}"


def meta_arrays(config: LlamaConfig, form: MetaForm, rank: int) -> dict[str, ArrayPlan]:
    """Return the arrays of one process by Meta's name."""
    plans = {}
    for name, shape in tensor_shapes(config).items():
        part = part_of(config, name, shape, form.processes, rank)
        if name == EMBEDDING and not form.by_token:
            rows, cols = extent(shape)
            part = Part(name, rows, share(cols, form.processes, rank))
        parts: tuple[Part, ...] = (part,)
        if ".q_proj." in name or ".k_proj." in name:
            parts = interleaved_rows(part, len(part.rows) // config.head_dim)
        plans[meta_name(name)] = ArrayPlan(meta_name(name), parts, False, len(shape) == 1)
    return plans


def open_meta(directory: Path) -> tuple[LlamaConfig, dict[str, Tensor], MetaForm]:
    """Return architecture and complete tensors of a release.

    Raises:
        UserError: a missing or damaged file, one that would run code, or tensors that are not those
            that ``params.json`` describes.
    """
    files = sorted(file for file in directory.glob("consolidated.*.pth") if _FILE.match(file.name))
    for rank, file in enumerate(files):
        if file.name != file_name(rank):
            raise UserError(
                f"{directory} lacks {file_name(rank)}: there are {len(files)} files up to "
                f"{files[-1].name}, and every process's is needed"
            )
    arrays = []
    for file in files:
        found = read_state_dict(file)
        arrays.append({n: t for n, t in found.items() if n != "rope.freqs"})
    check_ranks(arrays)
    config, form = _config(directory, arrays)
    plans = [meta_arrays(config, form, rank) for rank in range(len(arrays))]
    if config.tie_word_embeddings:
        for found in arrays:
            found.pop(meta_name(HEAD), None)
    check_names(directory, plans[0], arrays[0])
    of = f" of {len(files)} processes; are there more files?"
    return config, put_together(config, plans, arrays, of), form


def _config(directory: Path, arrays: list[dict[str, StoredTensor]]) -> tuple[LlamaConfig, MetaForm]:
    """Return what ``params.json`` says, with the sizes that only the files tell."""
    file = directory / PARAMS_NAME
    if not file.is_file():
        raise UserError(f"{directory} lacks {PARAMS_NAME}, which says what its files hold")
    params = read_json(file)
    missing = [key for key in _WANTED if type(params.get(key)) is not int or params[key] < 1]
    if missing:
        raise UserError(f"{file}: {', '.join(missing)} have to be positive whole numbers")
    first, count = arrays[0], len(arrays)
    embedding, gate = first.get(meta_name(EMBEDDING)), first.get("layers.0.feed_forward.w1.weight")
    if embedding is None or gate is None or len(embedding.shape) != 2 or len(gate.shape) != 2:
        raise UserError(f"{directory / file_name(0)} holds no embedding or feed-forward matrix")
    by_token = embedding.shape[1] == params["dim"]  # Llama 3; before, each held some columns
    vocabulary = embedding.shape[0] * (count if by_token else 1)
    said = params.get("vocab_size", -1)
    if said not in (-1, vocabulary):
        raise UserError(
            f"{file}: vocab_size={said}, but {count} files hold {vocabulary} rows; is one missing?"
        )
    # Meta's code reads an output matrix in any case, of Llama 3.2 the embedding once more.
    pairs = [(found[meta_name(EMBEDDING)], found.get(meta_name(HEAD))) for found in arrays]
    tied = all(other is None or (by_token and same(one, other)) for one, other in pairs)
    heads = params["n_heads"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=params["dim"],
        intermediate_size=gate.shape[0] * count,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        max_position_embeddings=_context(params, vocabulary),
        head_dim=params.get("head_dim") or 0,
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=float(params.get("rope_theta", 10000.0)),
        rope_scaling=_scaling(params),
        tie_word_embeddings=tied,
        **_ids(vocabulary),
    )
    return config, MetaForm(count, by_token)


def _ids(vocabulary: int) -> dict[str, Any]:
    if vocabulary == _LLAMA3_VOCABULARY:
        return {"bos_token_id": 128000, "eos_token_id": (128001,)}
    return {}


def _context(params: Mapping[str, Any], vocabulary: int) -> int:
    """Return the trained context, which Meta's files do not say: that of the model's generation."""
    if type(params.get("max_seq_len")) is int:
        return int(params["max_seq_len"])
    if params.get("use_scaled_rope"):
        return _SCALED_CONTEXT
    if vocabulary == _LLAMA3_VOCABULARY:
        return 8192
    return 2048 if params.get("norm_eps") == 1e-6 else 4096


def _scaling(params: Mapping[str, Any]) -> RopeScaling:
    if not params.get("use_scaled_rope"):
        return RopeScaling()
    small = [PRESETS["llama-3.2-1b"], PRESETS["llama-3.2-3b"]]
    is_small = any(
        (one.hidden_size, one.num_hidden_layers) == (params["dim"], params["n_layers"])
        for one in small
    )
    factor = params.get("rope_scaling_factor") or (32.0 if is_small else 8.0)
    return RopeScaling(
        "llama3",
        float(factor),
        high_freq_factor=float(params.get("rope_high_freq_factor") or 4.0),
    )
