"""Names in the pages are names in the code: files, modules, symbols and flags; and the tree."""

import ast
import dataclasses
import importlib
import io
import pkgutil
import re
import runpy
import shutil
import sys
import warnings
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

import llm.config
from common.flag_registry import Registry
from llm.config.scripts import SCRIPTS
from scripts import tree
from tests.distributed.test_equality import LAYOUTS
from tests.page_commands import READMES, bash_commands
from tests.unit.test_imports import FLOORS, OURS

REPO = Path(__file__).resolve().parents[2]
# The tree quotes docstrings, whose short names lie beside them.
PAGES = sorted({*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")} - {REPO / tree.PAGE})
pages = pytest.mark.parametrize("page", PAGES, ids=lambda file: file.name)
# What ends in one of these is a file of this repository, unless one of OUTSIDE is in its name.
ENDINGS = r"\.(?:py|md|yaml|yml|sh|toml|cc|cu|cuh|h|pth)"
OUTSIDE = ("outputs/", "results/", "CONFIG.yaml")
PACKAGES = "|".join((*OURS, "tests", "benchmarks"))
PROGRAMS = {
    *(file.name for file in REPO.glob("*.py")),
    *(
        "data.prepare",
        "data.merge",
        "data.conversations.make_task",
        "data.conversations.convert_instruct",
    ),
    *("llm.planner", "llm.serving.page.ui", "llm.serving.batch"),
}
FOREIGN_FLAGS = {
    *("nproc_per_node", "log_dir", "nnodes", "master", "rank", "devices"),  # Paddle's launcher
    *("model", "model_args", "tasks", "include_path", "apply_chat_template"),  # lm_eval
    *("cacert", "cert", "key"),  # curl
    *("now", "system", "rm", "stop-timeout"),  # systemctl, useradd, docker
    *("yes", "help"),  # pip; everybody
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """Return what stands between single backquotes."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def exists(name: str) -> bool:
    """Whether a path or pattern is in this repository; ``<name>`` in it stands for any."""
    return any(True for _ in REPO.glob(re.sub(r"<\w+>", "*", name.rstrip("/"))))


def assigned(node: ast.stmt) -> set[str]:
    """Return the names that a statement gives a value or a type."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)}


@cache
def definitions(file: Path) -> frozenset[str]:
    """Return the names of a module's functions, classes, values, and of members of its classes."""
    names: set[str] = set()
    for node in ast.parse(text_of(file)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            for member in node.body if isinstance(node, ast.ClassDef) else []:
                inner = {member.name} if isinstance(member, ast.FunctionDef) else assigned(member)
                names |= {f"{node.name}.{name}" for name in inner}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= assigned(node)
    return frozenset(names)


def why_unknown(name: str) -> str | None:
    """Return what is wrong with a dotted name of ours; None for a module or something in it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = REPO.joinpath(*parts[:length])
        rest = ".".join(parts[length:])
        if place.is_dir() and not rest:
            return None
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                known = not rest or rest in definitions(file)
                return None if known else f"{name}: {file.relative_to(REPO)} has no {rest}"
    return f"{name}: there is no such module"


# Files of other programs, which docs/migrate*.md name.
THEIRS = (
    *("run_finetune.py", "alignment/", "predict/", "tools/merge", "run_mindformer.py"),
    *("pretrain_gpt.py", "pretrain_llama.py", "config/llama/", "flashmask/", "FILE.yaml"),
    *("examples/", "train_full/", "train_qlora/", "merge_lora/", "inference/", "research/"),
    *("_argument.json", "_lora_dpo.yaml", "dataset_info.json", "train.json", "dev.json"),
    *("quant.json", "train/*.json", "dev/*.json"),
)


@pages
def test_files_that_are_named_exist(page):
    """A name with an ending of source, or below a folder of ours, is a path from the root."""
    folders = "|".join(sorted({file.split("/")[0] for file in tree.files() if "/" in file}))
    wrong = []
    for word in (word for span in spans(page) for word in span.split()):
        name = word.strip("(),:;…").split("::")[0]
        named = re.fullmatch(rf"[\w./*-]+{ENDINGS}", name) or re.match(rf"(?:{folders})/", name)
        outside = OUTSIDE + (THEIRS if page.name.startswith("migrate") else ())
        if named and not any(place in name for place in outside) and not exists(name):
            wrong.append(name)
    assert not wrong


@pages
def test_modules_that_are_named_exist(page):
    """Dotted names of ours, in prose and in examples, and what follows ``python -m``."""
    text = text_of(page)
    names = re.findall(rf"(?<![\w./-])((?:{PACKAGES})(?:\.\w+)+)(?![\w/]|\.\w)", text)
    names = [name for name in names if not re.search(rf"{ENDINGS}$", name)]
    for module, found in re.findall(rf"^\s*from ((?:{PACKAGES})[\w.]*) import (.+)$", text, re.M):
        names += [f"{module}.{name.strip()}" for name in found.split(",")]
    names += re.findall(rf"python -m ((?:{PACKAGES})[\w.]*)", text)
    assert [why for why in map(why_unknown, names) if why] == []


@pages
def test_symbols_stand_where_the_page_says(page):
    """Of ``symbol`` (``path.py``), and of table rows that begin with the two, each in its file."""
    pairs = re.findall(r"`([A-Za-z_][\w.]*)` \(`([\w/]+\.py)`", prose(page))
    pairs += re.findall(r"^\| `([A-Za-z_][\w.]*)` \| `([\w/]+\.py)` \|", prose(page), re.M)
    wrong = [
        f"{path} has no {name}"
        for name, path in pairs
        if not (REPO / path).is_file() or name not in definitions(REPO / path)
    ]
    assert not wrong


@pages
def test_tables_of_a_package_name_its_files(page):
    """A table headed "file of ``package``" has modules of that package in its first column."""
    for package, body in re.findall(
        r"^\| file of `([\w/]+)` .*\n\|[-| ]+\|\n((?:\|.*\n)+)", text_of(page), re.M
    ):
        for row in body.splitlines():
            names = re.findall(r"`(\w+)`", row.split("|")[1])
            assert names, row
            assert [n for n in names if not (REPO / package / f"{n}.py").is_file()] == []


@cache
def flags_of_ours() -> frozenset[str]:
    """Return every flag that a script, tool or benchmark of this repository declares."""
    known: set[str] = set()
    modules = [f"llm.config.{info.name}" for info in pkgutil.iter_modules(llm.config.__path__)]
    for module in ("data.arguments", *modules):
        for group in vars(importlib.import_module(module)).values():
            if isinstance(group, type) and dataclasses.is_dataclass(group):
                for field in dataclasses.fields(group):
                    known |= {field.name, *field.metadata.get("aliases", ())}
    for name in tree.files():
        if name.endswith(".py"):  # command lines that stand alone
            known |= set(re.findall(r'^ +\S*\(?\s*"--([\w-]+)"', text_of(REPO / name), re.M))
            known |= set(re.findall(r"(\w+): [^\n=]+ = arg\(", text_of(REPO / name)))
    for groups in SCRIPTS.values():  # and those of other programs
        names = Registry(groups).names()
        known |= names | {name.replace("_", "-") for name in names}
    return frozenset(known)


@pages
def test_flags_that_are_named_exist(page):
    text = re.sub(r"^ *(?:pip|g\+\+|nvcc|git) .*$", "", text_of(page), flags=re.M)
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    ours = flags_of_ours()
    switched_off = {flag for flag in flags if flag.removeprefix("no_") in ours}
    assert sorted(flags - ours - switched_off - FOREIGN_FLAGS) == []


@cache
def flags_in_help(program: str) -> frozenset[str]:
    """Return the flags that ``--help`` of a script, or of a module that is run, lists."""
    said = io.StringIO()
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    with (
        mock.patch.object(sys, "argv", [program, "--help"]),
        redirect_stdout(said),
        warnings.catch_warnings(action="ignore"),  # modules that have been imported already
        pytest.raises(SystemExit) as stop,
    ):
        run(str(REPO / program) if program.endswith(".py") else program, run_name="__main__")
    assert not stop.value.code
    return frozenset(re.findall(r"(?<![\w-])--([\w-]+)", said.getvalue()))


@pages
def test_commands_have_flags_of_their_program(page):
    """Of every command in a block or in backquotes, by the program's own help."""
    wrong = []
    for words in [*bash_commands(page), *(span.split() for span in spans(page))]:
        places = [place for place, word in enumerate(words) if word in PROGRAMS]
        if places:
            program = words[places[-1]]
            given = {re.match(r"--([\w-]*)", word) for word in words[places[-1] :]} - {None}
            unknown = {flag[1] for flag in given} - flags_in_help(program)
            unknown -= Registry(SCRIPTS.get(program, ())).names()
            wrong += [f"{program} --{flag}" for flag in sorted(unknown)]
    assert not wrong


def test_the_checks_find_what_is_stale(tmp_path):
    """Each of the tests above fails on a page with one stale name."""
    page = tmp_path / "page.md"

    def fails(test, text):
        page.write_text(text)
        with pytest.raises(AssertionError):
            test(page)

    fails(test_files_that_are_named_exist, "see `modelling.py`")
    fails(test_files_that_are_named_exist, "see `llm/llama/packing.py`")
    fails(test_files_that_are_named_exist, "run `python llm/nothing.py --x`")
    fails(test_modules_that_are_named_exist, "`llm.engine.block_manager`")
    fails(test_modules_that_are_named_exist, "`llm.llama.build.load_nothing`")
    fails(test_modules_that_are_named_exist, "```bash\npython -m data.instruct\n```")
    fails(test_modules_that_are_named_exist, "```python\nfrom llm.llama.build import nothing\n```")
    fails(test_symbols_stand_where_the_page_says, "`nothing` (`llm/llama/build.py`)")
    fails(test_symbols_stand_where_the_page_says, "| `build_model` | `llm/llama/config.py` | x |")
    table = "| file of `llm/engine` | x |\n|-|-|\n| `block_manager` | b |\n"
    fails(test_tables_of_a_package_name_its_files, table)
    fails(test_flags_that_are_named_exist, "`--max_stepz 3`")
    fails(test_commands_have_flags_of_their_program, "`python server.py --lora_rank 8`")
    block = "```bash\npython -m data.prepare --input a \\\n  --lora_rank 8\n```"
    fails(test_commands_have_flags_of_their_program, block)


# --- the tree -------------------------------------------------------------------------------------


def test_tree_is_what_the_script_writes():
    if shutil.which("git") is None or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    assert text_of(REPO / tree.PAGE) == tree.page(), "run `make tree`"


def test_tree_goes_up_floor_by_floor():
    rooms = [room.replace(".", "/") for floor in FLOORS for room in floor]
    places = [tree.ORDER.index(room) for room in rooms if room != "llm/runtime"]
    assert places == sorted(places)


@pytest.mark.parametrize("page", [*READMES, "CONTRIBUTING.md"])
def test_floors_are_those_of_the_import_test(page):
    rows = re.findall(r"^\| (\d) \| ([^|]*)", text_of(REPO / page), re.M)
    shown = {
        int(floor): {
            name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([\w/.]+)`", cell)
        }
        for floor, cell in rows
    }
    assert shown == {floor: set(rooms) for floor, rooms in enumerate(FLOORS)}


# --- the two first pages --------------------------------------------------------------------------


def kind(line: str) -> str:
    """Return what a line of Markdown is, without its words."""
    mark = re.match(r"#+ |\||[*-] |\d+\. |```\w*|$", line)
    return f"{mark[0]} {line.count('|')}" if mark else "text"


def test_first_pages_are_short_and_say_the_same_line_by_line():
    english, chinese = (text_of(REPO / page).splitlines() for page in READMES)
    assert len(english) <= 300
    assert [kind(line) for line in english] == [kind(line) for line in chinese]


def test_first_pages_name_the_same_things():
    """Every file, flag and command that one page names stands in the same line of the other."""
    english, chinese = (text_of(REPO / page).splitlines() for page in READMES)
    for number, lines in enumerate(zip(english, chinese, strict=True), 1):
        first, second = (sorted(re.findall(r"`[^`]+`", line)) for line in lines)
        assert first == second, number


@pytest.mark.parametrize("page", READMES)
def test_first_pages_count_the_layouts_that_are_compared(page):
    layouts = {str(sorted(case.layout.items())) for case in LAYOUTS.values()}
    assert re.search(rf"1e-5.*\b{len(layouts)}\b|1e-5.*共 {len(layouts)} 种", text_of(REPO / page))


# --- dependencies ---------------------------------------------------------------------------------

REQUIREMENTS = {
    "requirements.txt": "constraints.txt",
    "requirements-dev.txt": "constraints.txt",
    "requirements-lmeval.txt": "constraints-lmeval.txt",
    "requirements-peers.txt": "constraints-peers.txt",
    "requirements-bench.txt": "constraints-peers.txt",
    "requirements-openvino.txt": "constraints-openvino.txt",
    "requirements-clients.txt": "constraints-clients.txt",
    "requirements-vllm.txt": "constraints-vllm.txt",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirements_file_is_held():
    assert set(REQUIREMENTS) == {file.name for file in REPO.glob("requirements*.txt")}


@pytest.mark.parametrize(("file", "constraints"), REQUIREMENTS.items(), ids=REQUIREMENTS)
def test_requirements_have_a_reason_and_a_pin(file, constraints):
    pins = {
        normal(line.split("==")[0])
        for line in text_of(REPO / constraints).splitlines()
        if re.match(r"[\w.-]+==\S+$", line)
    }
    lines = [line for line in text_of(REPO / file).splitlines() if line and line[0] not in "#-"]
    assert lines
    for line in lines:
        name, _, reason = line.partition("  # ")
        assert reason, f"{file}: {line} does not say what for"
        assert normal(re.split(r"[=<>!~ \[]", name)[0]) in pins, f"{name} is not in {constraints}"
