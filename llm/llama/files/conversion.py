"""From one directory to another, all or nothing."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import check_directory, new_directory
from data.tokenization.model_files import TEMPLATES
from llm.llama.files.checkpoint import Checkpoint
from llm.llama.files.copying import copy
from llm.llama.files.dtypes import HEADERS, NAMES
from llm.llama.files.rank_layout import RankLayout
from llm.llama.files.target import Plan, plan_hugging_face, plan_ranks

CONFIG_NAME = "config.json"
# Everything that belongs to a model and is not its weights.
_CARRIED = (
    *("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("LICENSE*", "USE_POLICY*", "README*"),
)


def convert(
    source: Checkpoint,
    target: str | Path,
    *,
    layout: RankLayout | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    threads: int = 2,
    check: Any = None,
) -> list[str]:
    """Write a checkpoint in another layout or type.

    Memory holds at most twice the largest tensor at a time, and some slabs.

    Args:
        source: from :func:`llm.llama.files.checkpoint.open_checkpoint`.
        target: a new or empty directory.
        layout: PaddleNLP's degrees; Hugging Face's safetensors when not given.
        dtype: ``float32``, ``float16`` or ``bfloat16``; each tensor's own when not given.
        max_shard_bytes: of a safetensors file.
        threads: tensors that are read and written at a time.
        check: called with the result's directory before it gets its name.

    Returns:
        Names of tensors of which the source's ranks hold copies that differ; the first rank's was
        taken.

    Raises:
        UserError: degrees that do not fit, a target that exists, too little room, a number that the
            type cannot hold, or a check that fails. The target is as it was.
    """
    target = Path(target)
    _check_target(source.directory, target)
    types = {name: HEADERS.get(str(dtype), t.dtype) for name, t in source.tensors.items()}
    try:
        with new_directory(target) as temporary:
            temporary.mkdir()
            plan = _plan(source, temporary, types, layout, max_shard_bytes)
            _check_room(plan, target)
            differing = copy(source.tensors, plan, threads, "converting")
            plan.documents[CONFIG_NAME] = _config(source, layout, types)
            _write_documents(temporary, plan.documents)
            _carry(source.directory, temporary)
            if check is not None:
                check(temporary)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return differing


def _plan(
    source: Checkpoint,
    directory: Path,
    types: Mapping[str, str],
    layout: RankLayout | None,
    max_shard_bytes: int,
) -> Plan:
    if layout is None:
        return plan_hugging_face(directory, source.config, types, max_shard_bytes)
    if "F64" in types.values():
        raise UserError("PaddleNLP's files have no float64; give --dtype float32")
    return plan_ranks(directory, source.config, types, layout)


def _check_target(source: Path, target: Path) -> None:
    check_directory(target, "output_dir", "the result")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} is inside the checkpoint that it is made from")


def _check_room(plan: Plan, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < plan.size:
        raise UserError(
            f"{target} is going to have {plan.size / 1e9:.1f} GB, the disk has room for "
            f"{free / 1e9:.1f} GB"
        )


def _config(
    source: Checkpoint, layout: RankLayout | None, types: Mapping[str, str]
) -> dict[str, Any]:
    """Return config.json in the spelling of the target, with the type that all tensors have."""
    kinds = set(types.values())
    dtype = NAMES[kinds.pop()] if len(kinds) == 1 and "F64" not in kinds else None
    if source.layout is None and layout is None:
        keys = [key for key in ("dtype", "torch_dtype") if key in source.raw] or ["torch_dtype"]
        raw = {**source.raw, **(dict.fromkeys(keys, dtype) if dtype else {})}
        if raw.get("tie_word_embeddings") and not source.config.tie_word_embeddings:
            raw["tie_word_embeddings"] = False  # the files hold two matrices that differ
        return raw
    raw = source.config.to_hf(dtype or "float32")
    if layout is not None:
        raw |= {
            "dtype": raw["torch_dtype"],
            "tensor_parallel_degree": layout.tensor,
            "fuse_attention_qkv": layout.fuse_qkv,
            "fuse_attention_ffn": layout.fuse_ffn,
        }
    return raw


def _write_documents(directory: Path, documents: Mapping[str, Any]) -> None:
    for name, content in documents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def _carry(source: Path, target: Path) -> None:
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)
