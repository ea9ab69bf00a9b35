"""The command line of `data.prepare`: what to read, where to, and what of it belongs to a task."""

from dataclasses import dataclass
from typing import Literal

from common.flags import arg
from data.conversations.instruct import OnBad
from data.conversations.instruct_dataset import OnLong
from data.conversations.instruct_formats import FORMATS as CONVERSATIONS
from data.corpus.readers import FORMATS as TEXTS
from data.corpus.token_store import StoreFormat

# Files of examples that are told apart by their columns.
TABLES = ("json", "csv", "parquet")


@dataclass
class PrepareArguments:
    """What to read, with which tokenizer, and where the store goes."""

    task: Literal["pretrain", "instruct"] = arg(
        "pretrain",
        "pretrain: every token is learnt; instruct: examples, of which the answers are",
    )
    input: list[str] = arg([], "files, directories or globs", required=True)
    tokenizer: str = arg(
        "",
        "a model directory or a tokenizer file (tokenizer.model, tokenizer.json)",
        aliases=("tokenizer_name_or_path",),
        required=True,
    )
    output_prefix: str = arg("", "where the store goes", required=True)
    input_format: str = arg(
        "auto",
        "what the input is (auto: by ending and content)",
        choices=tuple(dict.fromkeys(("auto", *TEXTS, *CONVERSATIONS, *TABLES))),
    )
    format: StoreFormat = arg(
        "bin", "layout of the store: bin = .bin + .idx, npy = _ids.npy + _idx.npz"
    )
    on_bad_line: OnBad = arg(
        "error",
        "error: stop at the first bad line (broken JSON, no such key, not UTF-8, ...), so that "
        "nothing is lost unnoticed; skip: leave it out, count it and list it in "
        "PREFIX.bad_lines.txt",
    )
    overwrite: bool = arg(False, "replace a store, or an unfinished run")


@dataclass
class CorpusArguments:
    """With --task pretrain: what a document is, and what is put around it."""

    json_key: str = arg("text", "the key of the text in JSON lines", only_with="task=pretrain")
    txt_documents: Literal["blank_line", "file", "line"] = arg(
        "blank_line",
        "what ends a document in plain text (blank_line, as in PaddleNLP's tools)",
        only_with="task=pretrain",
    )
    dtype: Literal["auto", "uint16", "int32"] = arg(
        "auto",
        "type of the ids on disk (auto: uint16 below 65500 ids, else int32)",
        only_with="task=pretrain",
    )
    append_eos: bool = arg(
        False,
        "end each document with the EOS token",
        aliases=("add_eos_token", "append_eod"),
        only_with="task=pretrain",
    )
    prepend_bos: bool = arg(
        False,
        "begin each document with the BOS token, as prompts do where the model is asked",
        aliases=("add_bos_token",),
        only_with="task=pretrain",
    )
    shard: str | None = arg(
        None,
        "with 2/8 the second of eight parts of the input, as PREFIX-00002-of-00008; "
        "`python -m data.merge` puts them together",
        only_with="task=pretrain",
    )
    workers: int | None = arg(
        None, "processes; all cores when not given", minimum=1, only_with="task=pretrain"
    )


@dataclass
class ExamplesArguments:
    """With --task instruct: how examples are rendered, and how long they may be."""

    chat_template: str | None = arg(
        None,
        "a built-in template, a Jinja file, or a name among the tokenizer's, to train and to serve "
        "with; the tokenizer's default when not given",
        only_with="task=instruct",
    )
    src_length: int | None = arg(
        None,
        "tokens before the last answer; no limit when not given",
        minimum=1,
        only_with="task=instruct",
    )
    tgt_length: int | None = arg(
        None,
        "tokens of the last answer; no limit when not given",
        minimum=1,
        only_with="task=instruct",
    )
    on_long: OnLong = arg(
        "error", "what happens to examples above these lengths", only_with="task=instruct"
    )


GROUPS = (PrepareArguments, CorpusArguments, ExamplesArguments)
