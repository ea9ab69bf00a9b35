"""The READMEs and guides say what is true: links, names, models, versions, figures."""

import json
import re
from pathlib import Path

import pytest

from data.arguments import GROUPS as PREPARE
from llm.config.scripts import SCRIPTS
from llm.llama.config import PRESETS, load_config
from tests.page_commands import READMES, bash_commands

REPO = Path(__file__).resolve().parents[2]
LAUNCHER_FLAGS = ("--nproc_per_node", "--log_dir")
DOCUMENTS = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
pages = pytest.mark.parametrize("page", READMES)


def text_of(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def section(page: str, *headings: str) -> str:
    """Return the part of a page under whichever of the headings it has, up to the next one."""
    parts = re.split(r"^## ", text_of(page), flags=re.M)
    found = [part for part in parts if part.split("\n", 1)[0] in headings]
    assert len(found) == 1, f"{page}: one section among {headings}, not {len(found)}"
    return found[0]


def rows(text: str) -> list[list[list[str]]]:
    """Return the tables of a Markdown text: rows of stripped cells, without the heading rows."""
    tables, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            current.append([cell.strip() for cell in line.strip("|").split("|")])
        elif current:
            tables.append(current[2:])
            current = []
    return tables


def test_both_pages_show_the_same_commands():
    english, chinese = (bash_commands(REPO / page) for page in READMES)
    assert len(english) >= 12
    assert english == chinese


def test_every_stage_has_a_command():
    shown = {word for words in bash_commands(REPO / "README.md") for word in words}
    scripts = {file.name for file in REPO.glob("*.py")} - {"demo.py", "conftest.py"}
    assert scripts <= shown and "data.prepare" in shown


@documents
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    missing = {target for target in targets if not (document.parent / target).exists()}
    assert not missing


@documents
def test_files_and_tests_that_are_named_exist(document):
    """What stands in backquotes below a folder of this repository, with ``::test`` or without."""
    folders = "benchmarks|configs|data|docs|external_ops|llm|paddlenlp_ext|tests"
    text = document.read_text(encoding="utf-8")
    for path, test in re.findall(rf"`((?:{folders})/[\w./]+\.\w+)(?:::(\w+))?", text):
        assert (REPO / path).is_file() or "results/" in path, path
        if test:
            assert f"def {test}(" in (REPO / path).read_text(encoding="utf-8"), test


def test_log_quotes_a_measured_row():
    """The table of docs/log.md is output of benchmarks/bench_cpu_ops.py that was kept."""
    text = (REPO / "docs" / "log.md").read_text(encoding="utf-8")
    table = rows(text)[0]
    shown = {case: (float(first), float(second)) for case, _, first, _, second, _ in table}
    results = (REPO / "benchmarks" / "results" / "cpu_ops.jsonl").read_text(encoding="utf-8")
    measured = [json.loads(line)["milliseconds"] for line in results.splitlines()]
    as_shown = [
        {case: tuple(float(f"{ms:.3g}") for ms in forms.values()) for case, forms in row.items()}
        for row in measured
    ]
    assert shown in as_shown


@pages
def test_flags_in_prose_exist(page):
    known = {*LAUNCHER_FLAGS, "--help", "--model"}  # the latter is lm_eval's
    for group in {group for groups in (*SCRIPTS.values(), PREPARE) for group in groups}:
        for name, field in group.__dataclass_fields__.items():
            known |= {f"--{n}" for n in (name, *field.metadata.get("aliases", ()))}
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]+", prose))
    assert flags and flags <= known, flags - known


@pages
def test_model_table(page):
    (table,) = rows(section(page, "Models", "模型"))
    shown = {}
    for name, size, layers, hidden, ffn, heads, vocab, context, notes in table:
        number, unit = size.split()
        shown[name.strip("`")] = (
            (float(number), {"B": 1e9, "M": 1e6}[unit]),
            *(int(value) for value in (layers, hidden, ffn)),
            tuple(int(value) for value in re.findall(r"\d+", heads)),
            int(vocab),
            int(context),
            bool(re.search("tied|共享", notes)),
            next(iter(re.findall(r"rope (\w+)", notes)), "default"),
        )
    assert list(shown) == list(PRESETS)
    for name, ((number, unit), *rest) in shown.items():
        config = PRESETS[name]
        assert number == round(config.num_parameters / unit, 1), name
        assert rest == [
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            (config.num_attention_heads, config.num_key_value_heads),
            config.vocab_size,
            config.max_position_embeddings,
            config.tie_word_embeddings,
            config.rope_scaling.rope_type,
        ], name


@pages
def test_published_names_mean_built_in_shapes(page):
    text = section(page, "Models", "模型")
    family = r"[\w/.-]*(?:[Ll]lama|yi|smollm2|alpaca)-[\w.-]+"
    names = re.findall(rf"`({family}|__internal[\w/-]+)`", text)
    assert len(names) > len(PRESETS)
    for name in names:
        load_config(name)


@pages
def test_version_matrix(page):
    pinned = {}
    for file in ("constraints.txt", "constraints-peers.txt"):
        for line in (REPO / file).read_text(encoding="utf-8").splitlines():
            name, found, version = line.partition("==")
            if found:
                pinned.setdefault(name, version)
    (table,) = rows(section(page, "Versions", "版本"))
    table = {re.sub(r"[^\w-].*", "", row[0].strip("`")): row[1] for row in table}
    for name in ("paddlepaddle", "paddlenlp"):
        assert table[name] == pinned[name]
    assert table["paddlepaddle-gpu"] == pinned["paddlepaddle"]
    peers = next(version for version in table.values() if "torch" in version)
    for name in ("torch", "transformers", "peft"):
        assert f"{name} {pinned[name]}" in peers
    assert table["Python"] in (REPO / "pyproject.toml").read_text(encoding="utf-8")
