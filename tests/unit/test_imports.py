"""Who may import whom: read from the sources, and checked at run time for the slow packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
OURS = ("common", "data", "external_ops", "llm", "paddlenlp_ext")
SCRIPTS = sorted(path.stem for path in REPO.glob("*.py"))

# The floors, from the ground up: a room imports itself and rooms on lower floors, nothing else.
FLOORS = (
    ("common",),
    ("data", "external_ops"),
    ("llm.parallel", "llm.runtime"),
    ("llm.config",),
    ("llm.llama",),
    ("llm.engine", "llm.planner"),
    ("llm.evaluation", "llm.serving", "llm.train"),
    ("paddlenlp_ext",),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Inside llm/llama likewise: three rooms lie between the network and its assembly.
LLAMA = (
    ("config_keys", "layers", "placement", "places", "quant_config", "rope_scaling", "seams"),
    ("gguf_config",),
    ("config",),
    ("cache", "manifest", "rope"),
    ("modeling",),
    ("files", "fp8", "pipeline", "recompute", "fused_layer", "packed_layers", "frozen"),
    ("adapters",),
    ("quantization",),
    ("fused_blocks", "merging"),
    ("build", "fused"),
    ("fused_state",),
    ("export", "packed_cache", "saving"),
)
LLAMA_ROOMS = {f"llm.llama.{room}": floor for floor, rooms in enumerate(LLAMA) for room in rooms}
# What a room may not load, whatever its floor: it would be slow, or is another's business.
FOREIGN = {
    "common": ("paddle", "paddlenlp", "torch", "transformers", "numpy"),
    "data": ("paddle", "paddlenlp", "torch", "transformers"),
    "external_ops": ("paddlenlp",),
    "llm": ("paddlenlp",),
    **{
        f"llm.llama.{name}": ("paddlenlp", "paddle.distributed", "os", "llm.parallel")
        for name in ("modeling", "seams", "layers")
    },
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


def room_of(module: str, rooms: dict[str, int] = ROOMS) -> str | None:
    """Return the room that a module of ours lies in; None for the empty package above rooms."""
    return next((room for room in rooms if within(module, room)), None)


def found_in(files: dict[str, Path]) -> list[str]:
    """Return what in these modules imports against the floors, a line each."""
    wrong = []
    for module, file in files.items():
        room = room_of(module)
        assert room or not imported(file), f"{module} lies in no room; add it to FLOORS"
        for name in sorted(imported(file)):
            if name.split(".")[0] in SCRIPTS:
                wrong.append(f"{module} imports the script {name}")
            if name.split(".")[0] not in OURS:
                continue
            other = room_of(name)
            if other is None or (other != room and ROOMS[other] >= ROOMS[room]):
                wrong.append(f"{module} on floor {ROOMS[room]} imports {name}")
    return wrong


def found_in_llama(files: dict[str, Path]) -> list[str]:
    """Return what in llm/llama imports against its own floors, a line each."""
    wrong = []
    for module, file in files.items():
        if not module.startswith("llm.llama."):
            continue
        room = room_of(module, LLAMA_ROOMS)
        assert room, f"{module} lies in no room of llm/llama; add it to LLAMA"
        for name in sorted(imported(file)):
            other = room_of(name, LLAMA_ROOMS)
            if other not in (None, room) and LLAMA_ROOMS[other] >= LLAMA_ROOMS[room]:
                wrong.append(f"{module} on floor {LLAMA_ROOMS[room]} imports {name}")
    return wrong


def circles(files: dict[str, Path]) -> list[str]:
    """Return the modules that import each other in a ring, also inside functions."""
    graph = {
        module: {
            max((m for m in files if within(name, m)), key=len, default=None) for name in names
        }
        for module, names in ((module, imported(file)) for module, file in files.items())
    }
    left = {module: {o for o in others if o and o != module} for module, others in graph.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    # What only leads into a ring is no part of it.
    while ends := [m for m in left if not any(m in left[other] for other in left)]:
        for module in ends:
            del left[module]
    return sorted(left)


def test_rooms_import_lower_floors_only():
    assert found_in(dict(modules())) == []


def test_rooms_of_the_network_import_lower_floors_only():
    assert found_in_llama(dict(modules())) == []


def test_no_module_is_in_a_circle():
    assert circles(dict(modules())) == []


def test_a_program_imports_first_what_makes_ctrl_c_one_line():
    programs = [file for _, file in modules()] + sorted(REPO.glob("*.py"))
    programs = [file for file in programs if "run_script(main)" in file.read_text("utf-8")]
    assert len(programs) > len(SCRIPTS)
    for file in programs:
        first = next(
            node
            for node in ast.parse(file.read_text("utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        )
        assert getattr(first, "module", None) == "common.ending", file


def test_planted_arrows_are_found(tmp_path):
    def plant(module, text):
        file = tmp_path / f"{module}.py"
        file.write_text(text)
        return {**dict(modules()), module: file}

    up = plant("data.order", "def f():\n    from llm.engine import engine\n")
    assert found_in(up) == ["data.order on floor 1 imports llm.engine.engine"]
    beside = plant("llm.serving.text", "from llm.train.logs import logger\n")
    assert found_in(beside) == ["llm.serving.text on floor 6 imports llm.train.logs.logger"]
    script = plant("llm.train.logs", "import server\n")
    assert found_in(script) == ["llm.train.logs imports the script server"]
    inside = plant("llm.llama.files.slots", "from llm.llama.quantization import linear\n")
    assert found_in_llama(inside) == [
        "llm.llama.files.slots on floor 5 imports llm.llama.quantization.linear"
    ]
    ring = plant("llm.engine.sequence", "from llm.engine.engine import Engine\n")
    assert {"llm.engine.sequence", "llm.engine.engine"} <= set(circles(ring))


@pytest.mark.parametrize(("module", "file"), list(modules()), ids=[m for m, _ in modules()])
def test_rooms_load_nothing_foreign(module, file):
    names = imported(file)
    for room, packages in FOREIGN.items():
        if within(module, room):
            loaded = {name for name in names for package in packages if within(name, package)}
            assert not loaded, f"{module} loads {loaded}"


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


def test_a_model_is_looked_for_before_paddle_is_loaded():
    """What changes how paddle computes, and its signals, are settled before its import."""
    code = (
        "import sys, llm.engine.opening, llm.serving.terminal, llm.serving.service\n"
        "sys.exit('paddle' in sys.modules)"
    )
    assert not subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode


# Scripts that read data for a model, with data that is not there.
WITHOUT_DATA = {
    "evaluate_generation": ("--task", "choices", "--data_file", "nowhere.csv"),
    "predict_generation": ("--data_file", "nowhere.jsonl"),
    "finetune_generation": ("--do_train", "--dataset_name_or_path", "nowhere", "--output_dir", "x"),
}


@pytest.mark.parametrize("script", WITHOUT_DATA)
def test_data_is_refused_in_one_line_before_paddle_is_loaded(script):
    """An early import would make none of paddle's settings, and warn of this machine."""
    words = ["--model_name_or_path", "__internal_testing__/tiny-random-llama"]
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[f'{script}.py', *words, *WITHOUT_DATA[script]]!r}\n"
        "try:\n"
        f"    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 2, stop.code\n"
        "assert 'paddle' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_thin(script):
    limit = 180 if script == "demo" else 100
    assert len((REPO / f"{script}.py").read_text(encoding="utf-8").splitlines()) <= limit
