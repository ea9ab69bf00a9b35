"""Start servers as processes, wait for them, and end them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

REPO = Path(__file__).resolve().parents[2]
FAKE_SERVER = REPO / "tests" / "unit" / "serving" / "fake_server.py"


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """A server in a ``with`` block; its log goes to a file."""

    def __init__(self, command: list[str], log: Path, port: int, page_port: int = 0) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.page_url = f"http://127.0.0.1:{page_port}"
        self.port, self.page_port = port, page_port
        self.log = log
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
            cwd=log.parent,  # servers must not depend on the directory they are started in
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(
        self, kind: type | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for_log(self, pattern: str, seconds: float = 120) -> float:
        """Wait until the log has a line like this; return the seconds since the start."""
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            assert time.monotonic() - self.started < seconds, f"no {pattern!r} in {seconds} s"
            time.sleep(0.02)
        return time.monotonic() - self.started

    def wait_until_ready(self) -> float:
        """Wait for the API; return the seconds since the start."""
        return self.wait_for_log("API ready")

    def metric(self, name: str, **labels: str) -> float:
        """Read a series with these labels, whatever others it has; 0 before it is there."""
        text = requests.get(f"{self.url}/metrics", timeout=5).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_for_metric(self, name: str, value: float, seconds: float = 5) -> float:
        """Wait until a metric has the value; return how long it took."""
        begin = time.monotonic()
        while self.metric(name) != value:
            assert time.monotonic() - begin < seconds, f"{name} stayed {self.metric(name)}"
            time.sleep(0.02)
        return time.monotonic() - begin

    def stop(self, number: int = signal.SIGTERM, seconds: float = 10) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


def fake_server(
    directory: Path, *flags: str, page: bool = False, page_port: int = 0, **options: Any
) -> ServerProcess:
    """Start the server on a fake model; ``options`` are those of ``make_served``."""
    port, page_port = free_port(), page_port or free_port()
    command = [sys.executable, str(FAKE_SERVER), json.dumps(options), f"--flask_port={port}"]
    command += [f"--port={page_port}"] if page else ["--no_ui"]
    return ServerProcess([*command, *flags], directory / "server.log", port, page_port)
