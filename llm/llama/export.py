"""The static program for Paddle Inference, and its manifest.

One token-packed program serves prompts, single tokens and any mixture; the loop and the block
allocation stay outside, in ``llm.engine``.
"""

import re
from pathlib import Path
from typing import Any

import paddle
from paddle import nn
from paddle.static import InputSpec

from common.errors import UserError
from common.files import scratch_directory
from external_ops import native
from llm.llama.cache import cache_shape
from llm.llama.files.dtypes import dtype_name
from llm.llama.manifest import STEP_ARRAYS, Manifest, program_files
from llm.llama.modeling import LlamaForCausalLM


class _PackedProgram(nn.Layer):
    def __init__(self, model: LlamaForCausalLM, max_model_len: int) -> None:
        super().__init__()
        self.model = model
        self.max_model_len = max_model_len

    def forward(self, ids, sequence, position, block_table, rows, caches):
        """See ``LlamaForCausalLM.forward_paged``."""
        return self.model.forward_paged(
            ids, sequence, position, block_table, rows, caches, self.max_model_len
        )


def _input_spec(model: LlamaForCausalLM, block_size: int, dtype: str) -> list[Any]:
    shape = cache_shape(model.config, None, block_size)
    caches = [
        InputSpec(shape, dtype, f"cache_{kind}_{layer}")
        for layer in range(model.config.num_hidden_layers)
        for kind in ("key", "value")
    ]
    step = [InputSpec([None] * len(axes), kind, name) for name, axes, kind in STEP_ARRAYS]
    return [*step, caches]


def export_program(
    model: LlamaForCausalLM,
    output_path: str | Path,
    *,
    model_name: str,
    block_size: int,
    max_model_len: int | None = None,
    tokenizer_fingerprint: str | None = None,
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

    Raises:
        UserError: an output path without a file name, a context beyond the model's, or a prefix.
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
    dtype = dtype_name(model.model.embed_tokens.weight)
    with scratch_directory(output) as temporary:
        program = paddle.jit.to_static(
            _PackedProgram(model, length),
            full_graph=True,
            input_spec=_input_spec(model, block_size, dtype),
        )
        paddle.jit.save(program, str(temporary / output.name))
        made = program_files(temporary, output.name)
        ops = tuple(sorted(set(re.findall(r"llama_ops_[a-z_]*[a-z]", made[0].read_text("utf-8")))))
        manifest = Manifest(
            model_name=model_name,
            config=model.config.to_hf(dtype),
            block_size=block_size,
            max_model_len=length,
            cache_dtype=dtype,
            eos_ids=model.config.eos_token_id,
            tokenizer_fingerprint=tokenizer_fingerprint,
            paddle_version=paddle.__version__,
            ops=ops,
            packed_layout=0 if model.seams.fused is None else native.PACKED_LAYOUT,
            program_bytes=made[0].stat().st_size,
            weights_bytes=made[1].stat().st_size,
        )
        manifest.save(made[2])
        for file, target in zip(made, program_files(output.parent, output.name), strict=True):
            file.replace(target)
    return manifest
