"""Writes docs/migrate_*.md: what becomes of each setting of other programs, from the tables.

``make migrate-tables`` runs it; tests/unit/config/test_published.py fails when a page is not what
it writes. The tables are the ``FOREIGN`` of the groups in llm/config, which the scripts read.
"""

from collections.abc import Iterable
from pathlib import Path

from common.flag_registry import Registry
from common.foreign import Becomes, Idle, Only, Row, Sets
from llm.config.scripts import SCRIPTS

ROOT = Path(__file__).resolve().parents[1]

# Page, program, and what stands at the top.
PAGES = {
    "docs/migrate_paddlenlp.md": (
        "PaddleNLP",
        "Flags that are not listed have the name and the meaning that they have in PaddleNLP's "
        "`llm/` (3.0.0b4), or are not PaddleNLP's.",
    ),
    "docs/migrate_llama_factory.md": (
        "LLaMA-Factory",
        "Its YAML files are taken as they are. Keys that are not listed are "
        "those of Hugging Face's trainer, which have the same name here.",
    ),
    "docs/migrate_mindformers.md": (
        "mindformers",
        "Its YAML files have sections; a key is named with its section's before a dot, and "
        "`section.*` stands for those that have no row of their own.",
    ),
    "docs/migrate_megatron.md": (
        "Megatron-LM",
        "Megatron-LM's flags, and those of Pai-Megatron-Patch, in place of the command line behind "
        "`pretrain_gpt.py`. Flags that are not listed have the same name here.",
    ),
}
_SCRIPTS = (
    "run_pretrain.py",
    "finetune_generation.py",
    "quantize_generation.py",
    "merge_lora.py",
    "export_generation_model.py",
    "predict_generation.py",
    "infer_generation.py",
    "server.py",
    "convert_checkpoint.py",
)


def _words(values: Iterable[object]) -> str:
    shown = ("none" if value in (None, "") else str(value).lower() for value in values)
    return ", ".join(dict.fromkeys(f"`{word}`" for word in shown))


def becomes(row: Row) -> str:
    """Return a cell: what becomes of a setting."""
    if isinstance(row, Idle):
        return f"no effect: {row.why}"
    if isinstance(row, Only):
        return f"only {_words(row.values)}: {row.instead}" if row.values else f"no: {row.instead}"
    if isinstance(row, Sets):
        return row.words + (f"; {row.note}" if row.note else "")
    assert isinstance(row, Becomes)
    parts = [f"`{row.flag}`"]
    changed = {word: made for word, made in row.values.items() if word != str(made).lower()}
    if changed:
        words = ", ".join(f"{_words([word])} is {_words([made])}" for word, made in changed.items())
        parts.append(words)
    for why in dict.fromkeys(row.refused.values()):
        names = [word for word, reason in row.refused.items() if reason == why]
        parts.append(f"not {_words(names)}: {why}")
    return "; ".join(parts)


def _table(script: str, program: str) -> list[str]:
    rows: dict[str, Row] = {}
    for table in Registry(SCRIPTS[script]).programs:
        rows |= table.rows if table.name == program else {}
    cells: dict[str, list[str]] = {}
    for name, row in rows.items():
        cells.setdefault(becomes(row), []).append(f"`{name}`")
    return [f"| {', '.join(names)} | {cell} |" for cell, names in cells.items()]


def page(name: str) -> str:
    """Return the text of a page."""
    program, intro = PAGES[name]
    lines = [f"# From {program}: every setting", "", intro]
    lines.append(
        "\n`make migrate-tables` writes this page from the tables that the scripts read. How to "
        "begin: [migrate.md](migrate.md)."
    )
    seen: dict[str, str] = {}
    for script in _SCRIPTS:
        body = _table(script, program)
        if not body:
            continue
        lines += ["", f"## {script}", ""]
        same = seen.setdefault("\n".join(body), script)
        if same != script:
            lines.append(f"As [{same}](#{same.replace('.', '').lower()}).")
            continue
        lines += ["| setting | becomes |", "|---|---|", *body]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for place in PAGES:
        (ROOT / place).write_text(page(place), encoding="utf-8")
