"""From one directory to another, all or nothing."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError, UserError
from common.files import check_directory, new_directory
from common.gguf import gguf_file, read_gguf
from common.notes import say_once
from data.tokenization.gguf_vocabulary import holds_vocabulary
from data.tokenization.model_files import TEMPLATES
from data.tokenizer import Tokenizer, has_vocabulary, load_tokenizer
from llm.config.tools import ConvertArguments
from llm.llama.config import LlamaConfig
from llm.llama.files.checkpoint import Checkpoint
from llm.llama.files.copying import copy
from llm.llama.files.dtypes import HEADERS, NAMES
from llm.llama.files.gguf_writing import GGUFForm, plan_gguf
from llm.llama.files.megatron_writing import MegatronForm, plan_megatron
from llm.llama.files.meta import MetaForm
from llm.llama.files.meta_writing import plan_meta
from llm.llama.files.rank_layout import RankLayout
from llm.llama.files.target import Plan, plan_hugging_face, plan_paddlenlp, plan_ranks

CONFIG_NAME = "config.json"
_log = logging.getLogger(__name__)
# Everything that belongs to a model and is not its weights.
_CARRIED = (
    *("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", TEMPLATES),
)
_ABOUT = ("LICENSE*", "USE_POLICY*", "README*")


@dataclass(frozen=True)
class CompleteForm:
    """PaddleNLP's names and matrices, complete, in safetensors files.

    Attributes:
        fuse_qkv: query, key and value matrices are one.
        fuse_ffn: gate and up matrices are one.
    """

    fuse_qkv: bool = False
    fuse_ffn: bool = False


Form = (
    RankLayout | CompleteForm | GGUFForm | MetaForm | None
)  # of the result; None is Hugging Face's


def form_of(args: ConvertArguments) -> Form:
    """Return the form of the result that flags ask for.

    Raises:
        UserError: a GGUF file is asked for, and the source has no tokenizer to put into it.
    """
    if args.output_format == "gguf":
        name = Path(str(args.output_dir)).name
        blocks = args.gguf_type.upper() if args.gguf_type is not None else None
        return GGUFForm(load_tokenizer(str(args.input_dir)), name, blocks)
    if args.output_format == "meta":
        return MetaForm(args.tensor_parallel_degree)
    if args.output_format == "megatron":
        return MegatronForm(args.tensor_parallel_degree, args.pipeline_parallel_degree)
    if args.output_format == "paddlenlp":
        return CompleteForm(args.fuse_attention_qkv, args.fuse_attention_ffn)
    if not args.to_ranks:
        return None
    degrees = args.tensor_parallel_degree, args.pipeline_parallel_degree
    return RankLayout(*degrees, args.fuse_attention_qkv, args.fuse_attention_ffn)


def convert(
    source: Checkpoint,
    target: str | Path,
    *,
    layout: Form = None,
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
        layout: form of the result: PaddleNLP's ranks or complete arrays, Meta's processes, or what
            a GGUF file holds beside the weights; Hugging Face's safetensors when not given.
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
            _write_beside(source, layout, types, plan, temporary)
            if check is not None:
                check(temporary)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return differing


def _plan(
    source: Checkpoint,
    directory: Path,
    types: Mapping[str, str],
    layout: Form,
    max_shard_bytes: int,
) -> Plan:
    if isinstance(layout, GGUFForm):
        return plan_gguf(directory, source.config, types, layout)
    if isinstance(layout, MegatronForm):
        return plan_megatron(directory, source.config, types, layout)
    if isinstance(layout, MetaForm):
        return plan_meta(directory, source.config, types, layout)
    if layout is None:
        return plan_hugging_face(directory, source.config, types, max_shard_bytes)
    if "F64" in types.values():
        raise UserError("PaddleNLP's files have no float64; give --dtype float32")
    if isinstance(layout, CompleteForm):
        complete = RankLayout(1, 1, layout.fuse_qkv, layout.fuse_ffn)
        return plan_paddlenlp(directory, source.config, types, complete, max_shard_bytes)
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
    source: Checkpoint,
    layout: RankLayout | CompleteForm | MegatronForm | None,
    types: Mapping[str, str],
) -> dict[str, Any]:
    """Return config.json in the spelling of the target, with the type that all tensors have."""
    kinds = set(types.values())
    dtype = NAMES[kinds.pop()] if len(kinds) == 1 and "F64" not in kinds else None
    if source.is_hugging_face and layout is None:
        keys = [key for key in ("dtype", "torch_dtype") if key in source.raw] or ["torch_dtype"]
        raw = {**source.raw, **(dict.fromkeys(keys, dtype) if dtype else {})}
        if raw.get("tie_word_embeddings") and not source.config.tie_word_embeddings:
            raw["tie_word_embeddings"] = False  # the files hold two matrices that differ
        return raw
    raw = source.config.to_hf(dtype or "float32")
    if isinstance(layout, RankLayout | CompleteForm):
        raw |= {
            "dtype": raw["torch_dtype"],
            "tensor_parallel_degree": getattr(layout, "tensor", 1),
            "fuse_attention_qkv": layout.fuse_qkv,
            "fuse_attention_ffn": layout.fuse_ffn,
        }
    return raw


def _write_beside(
    source: Checkpoint, layout: Form, types: Mapping[str, str], plan: Plan, target: Path
) -> None:
    """Write what belongs to the model beside its weights."""
    _carry(source.directory, target, _carried_by(layout))
    if not isinstance(layout, GGUFForm | MetaForm):
        plan.documents[CONFIG_NAME] = _config(source, layout, types)
        tokenizer = _inner_tokenizer(source)
        if tokenizer is not None:
            tokenizer.save(target)
            plan.documents["generation_config.json"] = _generation(source.config)
    _write_documents(target, plan.documents)


def _write_documents(directory: Path, documents: Mapping[str, Any]) -> None:
    for name, content in documents.items():
        text = content
        if not isinstance(content, str):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def loses_tokenizer(source: Path, target: Path) -> bool:
    """Whether a result lacks what its source has: Meta's form knows tokenizer.model alone."""
    return _has_tokenizer(source) and not _has_tokenizer(target)


def _has_tokenizer(place: Path) -> bool:
    file = gguf_file(place)
    return has_vocabulary(place) if file is None else holds_vocabulary(read_gguf(file))


def _inner_tokenizer(source: Checkpoint) -> Tokenizer | None:
    """Return the tokenizer of a GGUF file, which nothing beside it holds.

    One of a kind that is not read keeps no weights from being converted; a line says so.
    """
    file = gguf_file(source.directory)
    if file is None or not holds_vocabulary(read_gguf(file)):
        return None
    try:
        return load_tokenizer(file)
    except DataError as error:
        say_once(_log, f"the tokenizer is not carried over: {error}")
        return None


def _generation(config: LlamaConfig) -> dict[str, Any]:
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_for_json,
        "pad_token_id": config.pad_token_id,
    }


def _carried_by(layout: Form) -> tuple[str, ...]:
    """Return what a form has beside the weights, of what the source has."""
    if isinstance(layout, GGUFForm):
        return _ABOUT
    if isinstance(layout, MetaForm):
        return ("tokenizer.model", *_ABOUT)
    return (*_CARRIED, *_ABOUT)


def _carry(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy files; beside a source that is one file lie only papers that belong to it."""
    directory = source.parent if source.is_file() else source
    for pattern in patterns if directory == source else _ABOUT:
        for file in directory.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if TEMPLATES in patterns and (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)
