"""Reads a command of a page with the parser of what it calls, without running it."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from common.devices import KINDS
from common.flags import load
from data.arguments import GROUPS as PREPARE
from data.conversations.convert_instruct import ConvertArguments
from data.conversations.make_task import TaskArguments
from data.merge import MergeArguments
from llm.config.evaluation import EvaluateArguments
from llm.config.scripts import SCRIPTS
from llm.config.serving import ChatPageArguments, ServerArguments
from llm.llama.config import load_config
from llm.planner.__main__ import read_recipe

REPO = Path(__file__).resolve().parents[2]
LAUNCHER = "paddle.distributed.launch"
# Modules that are called as programs, and the groups of their flags.
MODULES: dict[str, tuple[type, ...]] = {
    "data.prepare": PREPARE,
    "data.merge": (MergeArguments,),
    "data.conversations.convert_instruct": (ConvertArguments,),
    "data.conversations.make_task": (TaskArguments,),
    "llm.serving.page.ui": (ChatPageArguments,),
}


def launched(words: list[str]) -> tuple[list[str], int]:
    """Return what paddle's launcher would run, and as how many processes."""
    from paddle.distributed.launch.context.args_envs import parse_args

    with mock.patch.object(sys, "argv", ["launch", *words]):
        known, unknown = parse_args()
    assert not unknown, unknown
    devices = known.devices.split(",") if known.devices else [""] * (known.nproc_per_node or 1)
    processes = len(devices) * int(known.nnodes)
    return [known.training_script, *known.training_script_args], processes


def _script(words: list[str], processes: int = 1) -> None:
    script, *flags = words
    assert (REPO / script).is_file(), script
    if script not in SCRIPTS:  # benchmarks and the like: test_pages compares their flags
        return
    with mock.patch.dict("os.environ", {"PADDLE_TRAINERS_NUM": str(processes)}):
        groups = load(SCRIPTS[script], flags, prog=script)
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        value = next((getattr(g, name) for g in groups if getattr(g, name, None)), None)
        if value is not None and not value.startswith(("outputs/", "./")):  # the reader's own
            load_config(value)
    for file in next((g.data_file for g in groups if isinstance(g, EvaluateArguments)), None) or []:
        assert file.startswith("outputs/") or (REPO / file).exists(), file


def _module(module: str, words: list[str]) -> None:
    if module in SCRIPTS:
        load(SCRIPTS[module], words, prog=module)
        return
    if module in MODULES:
        options: Any = load(MODULES[module], words, prog=module)[0]
        for path in getattr(options, "input", []):
            assert path.startswith("outputs/") or (REPO / path).exists(), path
    elif module == LAUNCHER:
        _script(*launched(words))
    elif module == "llm.planner":
        read_recipe(words)
    elif module == "tests.device.run":
        script = next(place for place, word in enumerate(words) if word.endswith(".py"))
        _script(words[script:], 2)
    elif module == "pytest":
        assert all((REPO / word.partition("::")[0]).exists() for word in words), words
    else:
        assert module == "llama_paddle_ops" and not words, module
        assert (REPO / "external_ops" / module / "__main__.py").exists()


def _python(words: list[str]) -> None:
    words = words[words[0] == "-u" :]
    if words[0] == "-m":
        _module(words[1], words[2:])
    else:
        _script(words)


def _make(words: list[str]) -> None:
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, flags=re.M))
    settings = set(re.findall(r"^([A-Z]+) \?=", text, flags=re.M))
    assert words and {word for word in words if "=" not in word} <= targets, words
    for name, _, value in (word.partition("=") for word in words if "=" in word):
        assert name in settings, name
        assert name != "DEVICE" or value in KINDS, value
        assert name != "RECIPE" or (REPO / value).is_file(), value


def _pip(words: list[str]) -> None:
    constraints = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    paddle = next(line for line in constraints if line.startswith("paddlepaddle=="))
    if words[0] == "uninstall":
        assert words[-1] == "paddlepaddle"
    elif words[1].startswith("./"):
        assert (REPO / words[1] / "pyproject.toml").is_file(), words
    else:
        assert words[1] == paddle.replace("paddlepaddle", "paddlepaddle-gpu")


def _curl(words: list[str]) -> None:
    from llm.serving.bodies import parse_body
    from llm.serving.management import LoadBody, UnloadBody
    from llm.serving.openai.schema import ChatRequest, CompletionRequest
    from llm.serving.tgi.schema import GenerateRequest

    kinds = {
        "/v1/chat/completions": ChatRequest,
        "/v1/completions": CompletionRequest,
        "/generate": GenerateRequest,
    }
    managing = {
        "/metrics": None,
        "/v1/load_lora_adapter": LoadBody,
        "/v1/unload_lora_adapter": UnloadBody,
    }
    url = urlsplit(words[0])
    kind = (kinds if url.port == ServerArguments().flask_port else managing)[url.path]
    if kind is None:
        assert len(words) == 1, words
        return
    body = words[words.index("-d") + 1]
    parse_body(kind, json.dumps(json.loads(body)).encode())


def _lm_eval(words: list[str]) -> None:
    assert words[words.index("--model") + 1] == "paddle-llama"
    include = words[words.index("--include_path") + 1]
    task = words[words.index("--tasks") + 1]
    assert any(f"task: {task}\n" in f.read_text() for f in (REPO / include).rglob("*.yaml"))


def _exactly(*known: list[str]) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        assert words in known, words

    return check


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "python": _python,
    "make": _make,
    "pip": _pip,
    "curl": _curl,
    "source": _exactly([".venv/bin/activate"]),
    "pre-commit": _exactly(["install"]),
    "echo": lambda words: json.loads(words[0]) and None,
    "cd": _exactly(["external_ops", "&&", "python", "setup.py", "install"]),
    ".venv-lmeval/bin/lm_eval": _lm_eval,
}


def read(words: Sequence[str]) -> None:
    """Read a command line.

    Raises:
        AssertionError, UserError: something that it names does not exist, or its parser refuses.
    """
    rest = list(words)
    while "=" in rest[0]:  # variables before the command
        rest = rest[1:]
    assert rest[0] in PROGRAMS, f"no parser for {rest[0]}: add one to {__name__}"
    PROGRAMS[rest[0]](rest[1:])
