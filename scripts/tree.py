"""Writes docs/tree.md: every file of this repository with the sentence that it says of itself.

``make tree`` runs it; tests/unit/test_pages.py fails when the page is not what it writes. A file's
sentence is the first of its docstring or of the comment at its top. Files that cannot carry one
are described in ``SAID_HERE``.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/tree.md"

# From the ground floor up (tests/unit/test_imports.py), then what stands around the suite.
ORDER = (
    *("common", "data", "external_ops", "llm", "llm/parallel", "llm/config", "llm/llama"),
    *("llm/engine", "llm/planner", "llm/evaluation", "llm/serving", "llm/train", "paddlenlp_ext"),
    *("configs", "scripts", "benchmarks", "deploy", "docs", "tests"),
)
# Directories of files that nobody reads one by one.
CLOSED = {
    "data/assets": "tokenizer of the built-in tiny model; samples of tasks, written for this suite",
    "benchmarks/results": "rows of earlier runs, with date, hardware, versions and commit",
    "tests/fixtures": "local tasks for lm-evaluation-harness",
    "tests/native/sanitize": "cases that call the C functions with odd shapes",
    "tests/parity/adapter_reference": "what PEFT computed with small adapters",
    "tests/parity/reference": "what transformers computed with small models",
}
SAID_HERE = {
    ".ci": "continuous integration",
    ".gitignore": "what git leaves out",
    "LICENSE": "Apache-2.0",
    "README_zh.md": "the first page, in Chinese",
    "benchmarks": "a script per figure; `make bench`",
    "configs": "a file per recipe; those with `_gpu` have not run on one",
    "constraints-peers.txt": "every package of the environment of the peers, exactly",
    "deploy": "files for systemd, nginx, containers, Prometheus and Grafana; docs/deploy.md",
    "deploy/Dockerfile.dockerignore": "what an image does without",
    "deploy/grafana.json": "a dashboard for Grafana",
    "deploy/llama-paddle@.service": "a systemd unit for each of several servers",
    "deploy/nginx.conf": "TLS, streaming, several servers behind one address, the chat page",
    "deploy/prometheus.yml": "which servers Prometheus asks",
    "docs": "guides",
    "docs/chat_page.png": "the chat page, as docs/serving.md shows it",
    "external_ops/csrc": "the kernels in C++ and CUDA",
    "external_ops/csrc/cpu": "kernels for CPUs; most are compiled once per instruction set",
    "external_ops/csrc/include/llama_ops": "the C interface of both",
    "external_ops/csrc/laboratory": "what no machine has run yet",
    "external_ops/csrc/laboratory/cuda": "kernels for GPUs, which have run on an emulator only",
    "external_ops/csrc/paddle": "operators of Paddle around the C interface",
    "external_ops/pyproject.toml": "what pip needs for setup.py",
    "llm/evaluation/llama_paddle_suite.pth": "runs lm_eval_hook.py in an installed environment",
    "llm/serving/page/web": "what browsers get, as it is: no library, no build",
    "llm/serving/page/web/icon.svg": "the page's icon",
    "llm/serving/page/web/index.html": "the page's skeleton; its texts are in words.js",
    "pyproject.toml": "settings of ruff, mypy and pytest; what `pip install .` installs",
    "scripts": "launch lines of recipes, what fills environments, and this tree's writer",
    "tests": "`make test`",
    "tests/clients": "clients that others wrote, in an environment of their own",
    "tests/device": "a device in host memory, as a GPU or as itself, and the suite on it",
    "tests/device/csrc": "its runtime, its collectives and its kernels",
    "tests/device/site": "what Python imports at its start, in processes that have the device",
    "tests/distributed": "layouts on several CPU processes beside one process",
    "tests/e2e": "commands as users type them",
    "tests/native": "sanitizers, and CUDA kernels on an emulator",
    "tests/pages": "every command of the guides, run as it stands there",
    "tests/parity": "against transformers: live, and from committed reference files",
    "tests/unit": "one package or rule at a time",
}
# Comments of each kind of file: what begins a line of them.
_MARKS = {
    **dict.fromkeys((".cc", ".cu", ".cuh", ".h", ".js", ".css"), r"(?://+|/?\*+/?)"),
    **dict.fromkeys((".sh", ".txt", ".yaml", "", ".toml"), "#"),
}


def first_sentence(text: str) -> str:
    """Return a text's first sentence on one line, without its full stop."""
    paragraph = " ".join(text.strip().split("\n\n", maxsplit=1)[0].split())
    sentence = re.split(r"(?<!et al)\. (?=[A-Z`])|; see ", paragraph, maxsplit=1)[0]
    return sentence.rstrip(".:").replace("``", "`")


def _comment(text: str, mark: str) -> str:
    """Return the comment that a file begins with, behind a shebang and preprocessor lines."""
    lines = []
    for line in text.splitlines():
        found = re.match(rf"\s*{mark}(?!!)(.*?)(?:\*/)?$", line)
        if line.startswith(("#pragma", "#include", "#ifndef", "#define", "#!")):
            continue
        if found:
            lines.append(found[1].strip())
        elif lines or line:
            break
    return "\n".join(lines)


def _room_tested(name: str) -> str:
    """Return the room whose tests lie in ``tests/unit/name``, or the one around it."""
    rooms = [room for room in (name, f"llm/{name}") if (ROOT / room).is_dir()]
    return rooms[0] if rooms else _room_tested(name.rpartition("/")[0])


def said_of(path: Path) -> str:
    """Return what a file or directory says of itself, or what ``SAID_HERE`` does.

    Raises:
        SystemExit: nobody says anything.
    """
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir() and (path / "__init__.py").is_file():
        path = path / "__init__.py"
    sentence = SAID_HERE.get(name) or CLOSED.get(name) or ""
    if not sentence and name.startswith("tests/unit/") and path.is_dir():
        sentence = f"of `{_room_tested(name.removeprefix('tests/unit/'))}`"
    if not sentence and path.is_file():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            sentence = first_sentence(ast.get_docstring(ast.parse(text)) or "")
        elif path.suffix == ".md":
            sentence = text.splitlines()[0].lstrip("# ")
        elif path.suffix in _MARKS:
            sentence = first_sentence(_comment(text, _MARKS[path.suffix]))
    if not sentence:
        sys.exit(
            f"{name} does not say what it is; begin it with a docstring or a comment, or say "
            "it in SAID_HERE of scripts/tree.py"
        )
    return sentence


def files() -> list[str]:
    """Return the repository's files in git's order, new ones that git does not ignore included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in sorted(set(done.stdout.splitlines())) if (ROOT / name).is_file()]


def _place(directory: str) -> int:
    """Return how far down the page a directory stands.

    Raises:
        SystemExit: it lies in no room.
    """
    if not directory or directory.startswith("."):
        return -1
    rooms = [room for room in ORDER if f"{directory}/".startswith(f"{room}/")]
    if not rooms:
        sys.exit(f"{directory} lies in no room; add it to ORDER of scripts/tree.py")
    return ORDER.index(max(rooms, key=len))


def _sections(names: list[str]) -> dict[str, list[str]]:
    """Return the files of each directory, and closed directories among them, room by room."""
    sections: dict[str, list[str]] = {}
    for name in names:
        entry = next((closed for closed in CLOSED if name.startswith(f"{closed}/")), name)
        entries = sections.setdefault(entry.rpartition("/")[0], [])
        if entry not in entries:
            entries.append(entry)
    places = {directory: (_place(directory), directory) for directory in sections}
    return {directory: sections[directory] for _, directory in sorted(places.values())}


def page() -> str:
    """Return the text of docs/tree.md."""
    lines = [
        "# The tree",
        "",
        "Every file and what it says of itself, from the ground floor up. "
        "`make tree` writes this page;",
        "what stands here is the first sentence of each file.",
    ]
    for directory, entries in _sections(files()).items():
        sentence = f": {said_of(ROOT / directory)}" if directory else ""
        lines += ["", f"## {f'`{directory}/`' if directory else 'At the top'}{sentence}", ""]
        for entry in entries:
            if entry.endswith("/__init__.py"):
                continue
            slash = "/" if entry in CLOSED else ""
            label = entry[len(directory) :].lstrip("/") + slash
            lines.append(f"- [{label}](../{entry}): {said_of(ROOT / entry)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / PAGE).write_text(page(), encoding="utf-8")
