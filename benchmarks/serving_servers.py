"""Servers that bench_serving.py compares: what starts them, when they are ready, their CPU time."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from generation_peers import PEERS
from record import ROOT

OURS = "server.py"
_STARTS_S, _ENDS_S = 600.0, 40.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sizes:
    """What servers make room for.

    Args:
        threads: of computing.
        sequences: requests that are answered together.
        length: prompt plus answer, in tokens.
        step_tokens: of a step.
    """

    threads: int
    sequences: int
    length: int
    step_tokens: int = 512


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _ours(model: Path, port: int, sizes: Sizes) -> list[str]:
    place = "--model_dir" if (model / "llama.manifest.json").exists() else "--model_name_or_path"
    words: list[Any] = [sys.executable, ROOT / "server.py", place, model, "--no_ui"]
    words += ["--flask_port", port, "--threads", sizes.threads]
    words += ["--src_length", sizes.length, "--max_length", sizes.length]
    words += ["--max_num_seqs", sizes.sequences, "--max_num_batched_tokens", sizes.step_tokens]
    words += ["--dtype", "bfloat16"] if place == "--model_name_or_path" else []
    return [str(word) for word in words]


def _vllm(model: Path, port: int, sizes: Sizes) -> list[str]:
    words: list[Any] = [PEERS["vLLM"].python, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", model, "--port", port, "--host", "127.0.0.1", "--dtype", "bfloat16"]
    words += ["--max-model-len", sizes.length, "--max-num-seqs", sizes.sequences]
    words += ["--max-num-batched-tokens", sizes.step_tokens, "--disable-uvicorn-access-log"]
    return [str(word) for word in words]


def _vllm_settings(threads: int) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


COMMANDS: dict[str, Callable[[Path, int, Sizes], list[str]]] = {OURS: _ours, "vLLM": _vllm}


class Server:
    """A server in a process group of its own, which ends with the block.

    Args:
        name: of :data:`COMMANDS`.
        model: its directory.
        sizes: what it makes room for.
        log: gets all that it says.

    Raises:
        SystemExit: it ended before it was ready, or was not ready in ten minutes.
    """

    def __init__(self, name: str, model: Path, sizes: Sizes, log: Path) -> None:
        self.name, self._log = name, log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = COMMANDS[name](model, port, sizes)
        more = _vllm_settings(sizes.threads) if name == "vLLM" else {}
        began = time.perf_counter()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **more},
                start_new_session=True,
            )
        try:
            self._wait(began + _STARTS_S)
        except BaseException:
            self.close()
            raise
        self.ready_seconds = time.perf_counter() - began

    def _wait(self, end: float) -> None:
        while not self._healthy():
            if self._process.poll() is not None or time.perf_counter() > end:
                last = self._log.read_text("utf-8", "replace").strip().splitlines()[-1:]
                raise SystemExit(f"{self.name} did not start: {last}; {self._log} has all it said")
            time.sleep(0.02)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    @property
    def model(self) -> str:
        """What requests have to call its model."""
        return model_of(self.url)

    def cpu_seconds(self) -> tuple[float, float]:
        """Return the CPU time of the process that was started, and that of all below it."""
        own = below = 0.0
        for place in Path("/proc").glob("[0-9]*"):
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self._process.pid:  # its process group
                seconds = (int(fields[11]) + int(fields[12])) / _TICKS
                if int(place.name) == self._process.pid:
                    own += seconds
                else:
                    below += seconds
        return own, below

    def close(self) -> None:
        """End it, kindly at first."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def model_of(url: str) -> str:
    """Return the first model that a server names."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        name: str = json.loads(answer.read())["data"][0]["id"]
        return name
