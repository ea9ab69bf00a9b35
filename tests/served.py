"""A real server on the built-in tiny model for the harnesses of `make soak` and `make fuzz`."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

REPO = Path(__file__).resolve().parents[1]
MODEL = "__internal_testing__/tiny-random-llama"
_READY = re.compile(r"API ready: http://[^:]+:(\d+)/v1")
_START_S, _END_S = 120.0, 40.0


class Served:
    """server.py with its children, in a process group of its own.

    Args:
        place: a directory for its log.
        flags: beside those that name the model.
    """

    def __init__(self, place: Path, flags: Sequence[str] = ()) -> None:
        self.log = place / "server.log"
        command = [sys.executable, str(REPO / "server.py"), "--model_name_or_path", MODEL]
        command += ["--no_ui", "--flask_port", "0", "--chat_template", "llama3", *flags]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=stream, start_new_session=True
            )
        end = time.monotonic() + _START_S
        while (found := _READY.search(self.log.read_text())) is None:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def resident(self) -> float:
        """Return the memory of all its processes, in MiB."""
        pages = 0
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:
                    pages += int((place / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def metrics(self) -> dict[str, float]:
        """Return what /metrics says, summed over labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def healthy(self) -> bool:
        """Whether it says so, within seconds."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Return status and JSON of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            head = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), head)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def stop(self) -> tuple[int, str]:
        """End it; return its status and its log."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_S)
        status = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return -signal.SIGKILL if status is None else status, self.log.read_text()


@contextlib.contextmanager
def serving(place: Path, flags: Sequence[str] = ()) -> Iterator[Served]:
    """Run a server within a block."""
    served = Served(place, flags)
    try:
        yield served
    finally:
        served.stop()
