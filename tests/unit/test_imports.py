"""Who may import whom: read from the sources, and checked at run time for the slow packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
OURS = ("data", "external_ops", "llm", "paddlenlp_ext")
SCRIPTS = sorted(path.stem for path in REPO.glob("*.py"))

# A module, by its longest prefix here, may import its own package and what is listed.
ALLOWED = {
    "data": (),
    "external_ops": (),
    "llm.errors": (),
    "llm.files": (),
    "llm.runtime": ("llm.errors",),
    "llm.config": (
        *("llm.errors", "llm.files", "llm.parallel.layout", "llm.parallel.rules"),
        "external_ops.modes",  # names alone
    ),
    "llm.parallel": ("external_ops", "llm.errors", "llm.files"),
    "llm.parallel.plan": (
        *("llm.config", "llm.errors", "llm.files"),
        "llm.llama.config",  # the shape alone
    ),
    "llm.llama.modeling": ("external_ops", "llm.llama.config", "llm.llama.rope"),
    "llm.llama.export": ("external_ops", "llm.engine", "llm.errors"),
    "llm.llama": ("external_ops", "llm.errors", "llm.files", "llm.parallel"),
    "llm.engine.replay": ("llm.runtime",),
    "llm.engine": (
        *("external_ops", "llm.errors", "llm.files"),
        *("llm.llama.config", "llm.llama.cache"),
    ),
    "llm.distributed": (*("llm.config", "llm.errors", "llm.llama", "llm.parallel"),),
    "llm.finetune": (
        *("data", "llm.config", "llm.distributed", "llm.engine", "llm.errors", "llm.llama"),
        *("llm.evaluation.answers", "llm.parallel.topology"),
    ),
    "llm.quantizing": (
        *("data", "llm.config", "llm.errors", "llm.files", "llm.evaluation", "llm.llama"),
    ),
    "llm.evaluation": (
        *("data", "llm.config", "llm.engine", "llm.errors", "llm.files", "llm.llama"),
        *("llm.prompting", "llm.runtime"),
    ),
    "llm.prompting": ("data", "llm.config", "llm.engine", "llm.errors", "llm.files"),
    "llm.serving": ("data", "llm.config", "llm.engine", "llm.errors", "llm.runtime"),
    "paddlenlp_ext": (
        *("data", "llm.config", "llm.errors", "llm.files", "llm.runtime", "llm.parallel"),
        "llm.llama.config",  # the shape alone: no network, no paddle
        *("llm.llama.parts", "llm.llama.safetensors_io"),  # how tensors lie in files
        "llm.evaluation.squad",  # pure functions of text
    ),
}


def modules():
    for package in OURS:
        for file in sorted((REPO / package).rglob("*.py")):
            parts = file.relative_to(REPO).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), file


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def rule_of(module: str) -> str:
    return max((rule for rule in ALLOWED if within(module, rule)), key=len)


@pytest.mark.parametrize(("module", "file"), list(modules()), ids=[m for m, _ in modules()])
def test_import_direction(module, file):
    if module == "llm":
        return
    rule = rule_of(module)
    package = ".".join(module.split(".")[: 2 if module.startswith("llm.") else 1])
    own = module if module == "llm.llama.modeling" else package
    for name in imported(file):
        assert name.split(".")[0] not in SCRIPTS, f"{module} imports the script {name}"
        if name.split(".")[0] in OURS:
            allowed = any(within(name, other) for other in (own, *ALLOWED[rule]))
            assert allowed, f"{module} imports {name}; rule {rule} allows {ALLOWED[rule]}"


@pytest.mark.parametrize(("module", "file"), list(modules()), ids=[m for m, _ in modules()])
def test_only_paddlenlp_ext_imports_paddlenlp(module, file):
    heavy = {name.split(".")[0] for name in imported(file)}
    assert "paddlenlp" not in heavy or within(module, "paddlenlp_ext")
    if within(module, "data"):
        assert not heavy & {"paddle", "torch", "transformers"}
    if within(module, "llm.llama.modeling"):
        names = imported(file)
        assert not any(within(n, "paddle.distributed") or within(n, "os") for n in names)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "conftest"])
def test_help_loads_nothing_slow(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "slow = {'paddle', 'paddlenlp', 'gradio', 'flask', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "--" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_thin(script):
    limit = 180 if script == "demo" else 100
    assert len((REPO / f"{script}.py").read_text(encoding="utf-8").splitlines()) <= limit
