"""The hook that shows installed packages' models to lm-evaluation-harness 0.4.13.

The harness itself is driven in tests/e2e/test_lm_eval.py; here, a package of three files stands in
its place, with the parts that the hook touches.
"""

import ast
import importlib
import subprocess
import sys
import tomllib

import pytest

REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        assert name not in self
        self[name] = target

model_registry = Registry()
"""
MODELS = "from lm_eval.api.registry import model_registry\nmodel_registry.register('own', 'kept')\n"
ENTRY_POINTS = "[lm_eval.models]\npaddle-llama = somewhere:Model\nown = elsewhere:Other\n"
CODE = """
from llm.evaluation import lm_eval_hook
import sys
before = set(sys.modules)
lm_eval_hook.install()
lm_eval_hook.install()
assert not {m for m in sys.modules if m.startswith(("paddle", "numpy", "lm_eval"))}
import json
import lm_eval.models
from lm_eval.api.registry import model_registry
assert lm_eval.models.__name__ == "lm_eval.models" and lm_eval.models.__file__
print(sorted((name, str(getattr(t, "value", t))) for name, t in model_registry.items()))
"""


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "lm_eval" / "api").mkdir(parents=True)
    (tmp_path / "lm_eval" / "models").mkdir()
    for part in ("", "api/"):
        (tmp_path / "lm_eval" / f"{part}__init__.py").touch()
    (tmp_path / "lm_eval" / "api" / "registry.py").write_text(REGISTRY, encoding="utf-8")
    (tmp_path / "lm_eval" / "models" / "__init__.py").write_text(MODELS, encoding="utf-8")
    info = tmp_path / "package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: package\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    return tmp_path


def test_declared_models_are_added_to_the_harness_own(stand_in, repo):
    done = subprocess.run(
        [sys.executable, "-S", "-c", CODE],
        env={"PYTHONPATH": f"{stand_in}:{repo}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('own', 'kept'), ('paddle-llama', 'somewhere:Model')]"


def test_the_project_declares_what_there_is(repo):
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))
    (target,) = project["project"]["entry-points"]["lm_eval.models"].values()
    module, name = target.split(":")
    tree = ast.parse((repo / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    ((directory, (file,)),) = project["tool"]["setuptools"]["data-files"].items()
    assert directory == "lib/python3.11/site-packages"
    line = (repo / file).read_text(encoding="utf-8").strip()
    statement, call = line.split("; ")
    hook = importlib.import_module(statement.removeprefix("import "))
    assert call == f"{hook.__name__}.install()" and callable(hook.install)
