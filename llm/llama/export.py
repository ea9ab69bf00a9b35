"""The static program for Paddle Inference, and its manifest.

One token-packed program serves prompts, single tokens and any mixture; the loop and the block
allocation stay outside, in ``llm.engine``.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

from common.errors import UserError
from common.files import scratch_directory
from external_ops import native
from llm.llama import fused_state
from llm.llama.cache import AUTO, cache_shape, choose_cache_dtype
from llm.llama.files.packed import Stored, write_packed
from llm.llama.manifest import STEP_ARRAYS, Manifest, packed_file, program_files
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.seams import CacheLayout


class _PackedProgram(nn.Layer):
    def __init__(self, model: LlamaForCausalLM, max_model_len: int, weights: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.max_model_len = max_model_len
        self.names = list(weights)

    def forward(self, ids, sequence, position, block_table, rows, caches, weights=()):
        """See ``LlamaForCausalLM.forward_paged``; packed weights come in like the rest."""
        step = ids, sequence, position, block_table, rows, caches, self.max_model_len
        return self._packed(step, weights) if weights else self.model.forward_paged(*step)

    @paddle.jit.not_to_static  # traced, not translated: packed networks have nothing to translate
    def _packed(self, step, weights):
        with fused_state.computing_with(self.model, dict(zip(self.names, weights, strict=True))):
            return self.model.forward_paged(*step)


def _input_spec(
    model: LlamaForCausalLM, block_size: int, dtype: str, weights: Mapping[str, Stored]
) -> list[Any]:
    shape = cache_shape(model.config, None, block_size, dtype)
    caches = [
        InputSpec(shape, dtype, f"cache_{kind}_{layer}")
        for layer in range(model.config.num_hidden_layers)
        for kind in ("key", "value")
    ]
    step = [InputSpec([None] * len(axes), kind, name) for name, axes, kind in STEP_ARRAYS]
    if not weights:
        return [*step, caches]
    types = {"BF16": "bfloat16", "F32": "float32", "U8": "uint8"}
    packed = [InputSpec(one.shape, types[one.dtype], name) for name, one in weights.items()]
    return [*step, caches, packed]


def _identity(files: Sequence[Path], weights: Mapping[str, Stored]) -> str:
    """Return what files of one export have in common, and with other exports only equal ones."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    for name, stored in weights.items():
        whole.update(f"\0{name}\0{stored.dtype}\0{stored.shape}\0".encode())
        whole.update(np.ascontiguousarray(stored.fetch()).data)
    return whole.hexdigest()[:32]


def export_program(
    model: LlamaForCausalLM,
    output_path: str | Path,
    *,
    model_name: str,
    block_size: int,
    max_model_len: int | None = None,
    tokenizer_fingerprint: str | None = None,
    cache_dtype: str = AUTO,
) -> Manifest:
    """Write program, weights and manifest; the files appear only once all are complete.

    Args:
        model: the network; switched to evaluation.
        output_path: directory and file prefix, such as ``inference/llama``.
        model_name: what servers report.
        block_size: tokens per cache block.
        max_model_len: longest prompt plus answer; the model's context when not given, of dynamic
            rotary scaling the trained one.
        tokenizer_fingerprint: identity of the tokenizer that belongs to the model.
        cache_dtype: type of the cache's numbers, ``auto`` for the network's.

    Raises:
        UserError: an output path without a file name, a context beyond the model's, a prefix, or a
            type of cache that the network's kernels have no form for.
    """
    output = Path(output_path)
    if not output.name or str(output_path).endswith("/") or output.is_dir():
        raise UserError(
            f"output_path={str(output_path)!r} has to end in a file prefix, as in inference/llama"
        )
    if model.seams.prefix is not None:
        raise UserError(
            "a model with a prefix cannot be exported: an exported program's cache belongs to the "
            "engine, which knows of no prefix; use predict_generation.py --prefix_path"
        )
    dynamic = model.config.rope_scaling.rope_type == "dynamic"
    context = model.config.context
    # A program's rotary tables are part of it: dynamic ones of a longer context would be other
    # tables for short rows too.
    length = max_model_len or (model.config.max_position_embeddings if dynamic else context)
    if length > context and not dynamic:
        raise UserError(f"max_model_len={length} exceeds the model's context of {context}")
    model.eval()
    dtype = model.model.embed_tokens.type_name
    layout = CacheLayout() if model.seams.fused is None else model.seams.fused.layout
    cache_dtype = choose_cache_dtype(layout, cache_dtype, dtype)
    with scratch_directory(output) as temporary:
        packed = model.seams.fused is not None  # an export's weights are then those of CPUs
        weights = fused_state.take_apart(model)[0] if packed else {}
        weights.pop("norm", None)  # Paddle opens no program without a weight of its own
        program = paddle.jit.to_static(
            _PackedProgram(model, length, weights),
            full_graph=True,
            input_spec=_input_spec(model, block_size, cache_dtype, weights),
        )
        paddle.jit.save(program, str(temporary / output.name))
        made = program_files(temporary, output.name)
        ops = tuple(sorted(set(re.findall(r"llama_ops_[a-z_]*[a-z]", made[0].read_text("utf-8")))))
        manifest = Manifest(
            model_name=model_name,
            config=model.config.to_hf(dtype),
            block_size=block_size,
            max_model_len=length,
            cache_dtype=cache_dtype,
            eos_ids=model.config.eos_token_id,
            tokenizer_fingerprint=tokenizer_fingerprint,
            paddle_version=paddle.__version__,
            ops=ops,
            packed_layout=0 if model.seams.fused is None else native.PACKED_LAYOUT,
            program_bytes=made[0].stat().st_size,
            weights_bytes=made[1].stat().st_size,
            packed_bytes=0,
            export=_identity(made[:2], weights),
        )
        beside = packed_file(temporary, output.name)
        if packed:
            write_packed(beside, manifest.described, weights, {"order": list(weights)})
            manifest = dataclasses.replace(manifest, packed_bytes=beside.stat().st_size)
        manifest.save(made[2])
        targets = program_files(output.parent, output.name)
        for file, target in zip(made, targets, strict=True):
            file.replace(target)
        stale = packed_file(output.parent, output.name)
        if packed:
            beside.replace(stale)
        else:
            stale.unlink(missing_ok=True)
    return manifest
