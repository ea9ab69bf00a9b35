"""A server of the suite's own environment, for clients that live in ``.venv-clients``.

``make clients`` runs this directory alone, with that environment's Python and ``PROJECT_PYTHON``
naming the suite's. In ``make test`` nothing of it is collected.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
MODEL = "__internal_testing__/tiny-random-llama"
PROJECT_PYTHON = os.environ.get("PROJECT_PYTHON")
if PROJECT_PYTHON is None:
    collect_ignore_glob = ["test_*.py"]

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Served:
    """A server that is ready.

    Args:
        url: without a path.
        model: what it calls its model.
    """

    url: str
    model: str


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The suite's server on its built-in tiny model, whose weights are random.

    What such a model says means nothing; what is held to a schema has to obey it all the same.
    """
    assert PROJECT_PYTHON is not None
    log = tmp_path_factory.mktemp("server") / "server.log"
    port = _free_port()
    words = [PROJECT_PYTHON, str(REPO / "server.py"), "--model_name_or_path", MODEL, "--no_ui"]
    words += ["--flask_port", str(port), "--chat_template", "llama3", "--max_num_seqs", "16"]
    words += ["--src_length", "600", "--max_length", "300"]
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, cwd=REPO)
    try:
        end = time.monotonic() + 120
        while not re.search("API ready", log.read_text()):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield Served(f"http://127.0.0.1:{port}", MODEL.rpartition("/")[2])
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def curl(served: Served) -> Any:
    """``curl(path, body)``: the status and JSON of a POST, by curl as guides show it."""

    def run(path: str, body: Any, *words: str) -> tuple[int, Any]:
        command = ["curl", "-s", "-w", "\\n%{http_code}", f"{served.url}{path}"]
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body), *words]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        text, _, status = said.rpartition("\n")
        return int(status), text

    return run


def project(script: Path, asked: Any) -> Any:
    """Run a script of this directory in the suite's environment: JSON in, JSON out."""
    assert PROJECT_PYTHON is not None
    done = subprocess.run(
        [PROJECT_PYTHON, str(script)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
