"""Which part of which matrix lies where in PaddleNLP's rank files.

A tensor's rows and columns are those of Hugging Face's ``[out, in]`` files throughout; PaddleNLP
stores linears ``[in, out]``. Names, fusing and splitting follow PaddleNLP 3.0's
``transformers/llama/modeling.py`` (``_get_tensor_parallel_mappings``,
``_get_fuse_or_split_param_mappings``) and ``conversion_utils.py``.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llm.llama.config import LlamaConfig
from llm.llama.placement import is_matrix, split_axis
from llm.parallel.layout import Layout

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_fused_proj"
# PaddleNLP keeps these whole where the degree does not divide them.
_MAY_BE_WHOLE = ("embed_tokens.", "lm_head.", "k_proj.", "v_proj.")


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor, and the rows that it takes in a stored array: from ``top`` on, each
    ``step`` behind the other.

    Both are seen the way Hugging Face orients them; vectors are matrices of one column.
    """

    tensor: str
    rows: range
    cols: range
    top: int = 0
    step: int = 1


@dataclass(frozen=True)
class ArrayPlan:
    """One array of a rank file."""

    name: str
    parts: tuple[Part, ...]
    transposed: bool  # the file holds [in, out]
    vector: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        height, width = sum(len(p.rows) for p in self.parts), len(self.parts[0].cols)
        if self.vector:
            return (height,)
        return (width, height) if self.transposed else (height, width)


@dataclass(frozen=True)
class RankLayout:
    """How PaddleNLP's files share out a model.

    Args:
        tensor: tensor parallel degree.
        pipeline: pipeline parallel degree.
        fuse_qkv: query, key and value matrices are one (``fuse_attention_qkv``).
        fuse_ffn: gate and up matrices are one (``fuse_attention_ffn``).
    """

    tensor: int = 1
    pipeline: int = 1
    fuse_qkv: bool = False
    fuse_ffn: bool = False

    def file_name(self, rank: int, stage: int) -> str:
        """Return a rank's file, such as ``model_state.tp00_pp01.pdparams``."""
        marks = [f"tp{rank:02}"] if self.tensor > 1 else []
        marks += [f"pp{stage:02}"] if self.pipeline > 1 else []
        return ".".join(["model_state", *(["_".join(marks)] if marks else []), "pdparams"])


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor of a model and its shape in Hugging Face's files, in their order."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for linear, (size_in, size_out) in config.linears.items():
            shapes[f"{prefix}.{linear}.weight"] = (size_out, size_in)
            if config.has_bias(linear):
                shapes[f"{prefix}.{linear}.bias"] = (size_out,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (hidden,)
    shapes[NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def extent(shape: tuple[int, ...]) -> tuple[range, range]:
    """Return the rows and columns of a whole tensor."""
    return range(shape[0]), range(shape[1] if len(shape) > 1 else 1)


def whole(name: str, shape: tuple[int, ...]) -> Part:
    """Return the part that is all of a tensor."""
    return Part(name, *extent(shape))


def interleaved_rows(part: Part, heads: int) -> tuple[Part, ...]:
    """Return a matrix of heads in the order of those who rotate neighbouring channels.

    Meta's files and llama.cpp's have channel i and channel i + half of a head side by side, where
    Hugging Face's have them half a head apart (``convert_llama_weights_to_hf.py``, ``permute``).

    Args:
        part: whole heads of a query or key matrix, or of its bias.
        heads: how many.
    """
    half = len(part.rows) // heads // 2
    found = []
    for head in range(heads):
        first = 2 * head * half
        for second in (0, 1):
            start = part.rows.start + first + second * half
            rows, top = range(start, start + half), part.top + first + second
            found.append(Part(part.tensor, rows, part.cols, top, 2))
    return tuple(found)


def share(whole: range, degree: int, rank: int) -> range:
    """Return one rank's of equal, consecutive parts."""
    size = len(whole) // degree
    return range(rank * size, (rank + 1) * size)


def part_of(config: LlamaConfig, name: str, shape: tuple[int, ...], degree: int, rank: int) -> Part:
    """Return what a tensor parallel rank holds of a tensor: some outputs, inputs or tokens, or all.

    Args:
        config: of the model.
        name: Hugging Face's.
        shape: of the tensor.
        degree: tensor parallel ranks.
        rank: the one in question.
    """
    rows, cols = extent(shape)
    axis = split_axis(name, transposed=True)
    if axis is None or len(shape) <= axis:
        return Part(name, rows, cols)
    units = _units(config, name) or shape[axis]
    if units % degree and any(word in name for word in _MAY_BE_WHOLE):
        return Part(name, rows, cols)
    if axis == 0:
        return Part(name, share(rows, degree, rank), cols)
    return Part(name, rows, share(cols, degree, rank))


def _units(config: LlamaConfig, name: str) -> int | None:
    """Return how many heads a matrix holds, if it holds heads."""
    if ".k_proj." in name or ".v_proj." in name:
        return config.num_key_value_heads
    return None


def _paddle_name(name: str) -> str:
    return "llama." + name.removeprefix("model.") if name.startswith("model.") else name


def rank_arrays(config: LlamaConfig, layout: RankLayout, rank: int) -> dict[str, ArrayPlan]:
    """Return the arrays of one tensor parallel rank, all stages together, by PaddleNLP's name."""
    fused: dict[str, list[Part]] = {}
    plans = []
    for name, shape in tensor_shapes(config).items():
        part = part_of(config, name, shape, layout.tensor, rank)
        target = _fused_name(name, layout)
        if target is not None:
            fused.setdefault(target, []).append(part)
            if len(fused[target]) == (3 if QKV in target else 2):
                parts = fused[target]
                parts = _interleaved(config, parts) if QKV in target else parts
                plans.append(
                    ArrayPlan(target, tuple(_stacked(parts)), len(shape) > 1, len(shape) == 1)
                )
            continue
        vector = len(shape) == 1
        plans.append(ArrayPlan(_paddle_name(name), (part,), not vector and is_matrix(name), vector))
    if config.tie_word_embeddings:
        # Kept on the last stage too, oriented as the embedding is.
        shape = tensor_shapes(config)[EMBEDDING]
        part = part_of(config, EMBEDDING, shape, layout.tensor, rank)
        plans.append(ArrayPlan(HEAD, (part,), False))
    return {plan.name: plan for plan in plans}


def _fused_name(name: str, layout: RankLayout) -> str | None:
    if layout.fuse_qkv and re.search(r"\.[qkv]_proj\.", name):
        return _paddle_name(re.sub(r"self_attn\.[qkv]_proj", QKV, name))
    if layout.fuse_ffn and re.search(r"\.(gate|up)_proj\.", name):
        return _paddle_name(re.sub(r"mlp\.(gate|up)_proj", GATE_UP, name))
    return None


def _interleaved(config: LlamaConfig, parts: list[Part]) -> Iterator[Part]:
    """Order heads as PaddleNLP's fused matrix does: a group's queries, its key, its value."""
    size = config.head_dim
    per_group = config.num_attention_heads // config.num_key_value_heads
    for group in range(len(parts[1].rows) // size):
        for part, heads in zip(parts, (per_group, 1, 1), strict=True):
            start = part.rows.start + group * heads * size
            yield Part(part.tensor, range(start, start + heads * size), part.cols)


def _stacked(parts: Iterable[Part]) -> Iterator[Part]:
    top = 0
    for part in parts:
        yield Part(part.tensor, part.rows, part.cols, top)
        top += len(part.rows)


def stage_of(name: str, config: LlamaConfig, pipeline: int) -> int:
    """Return the stage whose file holds one of PaddleNLP's arrays.

    Layers are cut evenly where that works; where it does not, PaddleNLP cuts the list of embedding,
    layers, norm and head evenly instead (``modeling_pp.py``, ``seg_method``).
    """
    layers = config.num_hidden_layers
    found = re.match(r"llama\.layers\.(\d+)\.", name)
    if layers % pipeline == 0:
        stages = Layout(pipeline=pipeline).stages(layers)
        if found is None:
            return 0 if "embed_tokens" in name else pipeline - 1
        return next(s for s, stage in enumerate(stages) if int(found[1]) in stage.layers[0])
    items = layers + 3
    small, larger = divmod(items, pipeline)
    place = 0 if "embed_tokens" in name else items - 1 if name == HEAD else items - 2
    place = int(found[1]) + 1 if found else place
    end = 0
    for stage in range(pipeline):
        # fleet gives the last stages the items that are left over.
        end += small + (stage >= pipeline - larger)
        if place < end:
            return stage
    return pipeline - 1
