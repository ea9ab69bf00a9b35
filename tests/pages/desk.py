"""A reader's directory: the checkout as links, and what its commands write beside them."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.distributed.forked_scripts import ForkedScript
from tests.page_commands import Shown
from tests.pages.rows import GIVEN, Run

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 900
# Ports that pages name; each is swapped for a free one.
PORTS = ("8010", "8011", "8012")
_OWN = {"outputs", ".git", ".pytest_cache", ".ruff_cache", ".mypy_cache"}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def with_flags(words: list[str], changes: str) -> list[str]:
    """Return a command with other values of flags; those that it lacks are added."""
    groups: list[list[str]] = []
    for word in shlex.split(changes):
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    for group in groups:
        start = words.index(group[0]) if group[0] in words else len(words)
        end = start + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        words = [*words[:start], *group, *words[end:]]
    return words


class Desk:
    """Where the commands of the pages run, one after another.

    Args:
        root: an empty directory.
        server: forks a script instead of starting an interpreter, where one is given.
    """

    def __init__(self, root: Path, server: Any = None) -> None:
        self.root = root
        self.server = server
        self.ports = {port: _free_port() for port in PORTS}
        self.behind: list[subprocess.Popen[str]] = []
        for place in REPO.iterdir():
            if place.name not in _OWN:
                (root / place.name).symlink_to(place)
        (root / "outputs").mkdir()

    def give(self, page: str) -> None:
        """Write what a page says that the reader has."""
        for name, content in GIVEN.get(page, {}).items():
            (self.root / name).write_text(content, encoding="utf-8")

    def line(self, one: Shown, row: Run) -> str:
        """Return the command line to run, with what its row changes."""
        text = one.text
        for old, new in {**row.words, **self.ports}.items():
            text = text.replace(old, new)
        if row.flags:
            head, tail = text, ""
            if "paddle.distributed.launch" in text:  # the script's flags, not the launcher's
                head, tail = re.match(r"(.*?\w+\.py )(.*)", text).groups()  # type: ignore[union-attr]
                return head + shlex.join(with_flags(shlex.split(tail), row.flags))
            return shlex.join(with_flags(shlex.split(head), row.flags))
        return text

    def run(self, one: Shown, row: Run) -> str:
        """Run a command to its end, or until it serves; return what it said.

        Raises:
            AssertionError: another exit status than the row's, or other words.
        """
        if row.behind:
            return self._serve(self.line(one, row))
        status, said = self._finish(one, row)
        shown = f"$ {one.text}\n{said[-3000:]}"
        assert status == row.status, f"exit status {status}\n{shown}"
        assert re.search(row.says, said), f"no {row.says!r}\n{shown}"
        return said

    def _finish(self, one: Shown, row: Run) -> tuple[int, str]:
        if one.kind == "bash":
            line = self.line(one, row)
            words = shlex.split(line)
            if self.server is not None and words[0] == "python":
                done = ForkedScript(self.server, words[1:], self.root).read()
            else:
                done = self._process(["bash", "-c", line])
        elif self.server is not None:
            file = self.root / "example.py"
            file.write_text(one.text, encoding="utf-8")
            done = ForkedScript(self.server, [file], self.root).read()
        else:
            done = self._process([self._python(), "-c", one.text])
        return done.returncode, done.stdout + done.stderr

    def _python(self) -> str:
        return (
            str(self.root / ".venv/bin/python")
            if (self.root / ".venv").exists()
            else sys.executable
        )

    def _environment(self) -> dict[str, str]:
        """What ``source .venv/bin/activate`` leaves: none of this process's own settings."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        places = [str(Path(self._python()).parent), "/usr/local/bin", "/usr/bin", "/bin"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        return kept | offline | {"PATH": ":".join(places)}

    def _process(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _serve(self, line: str) -> str:
        """Start a server and wait until the ports that its command names answer."""
        log = self.root / f"served-{len(self.behind)}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec env {line}"],
                cwd=self.root,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.behind.append(process)
        ports = set(re.findall(r"--(?:flask_)?port (\d+)", line))
        end = time.monotonic() + 120
        while ports:
            assert process.poll() is None, log.read_text(encoding="utf-8")[-3000:]
            assert time.monotonic() < end, f"{line}: ports {ports} do not answer"
            ports = {port for port in ports if not self._answers(port)}
            time.sleep(0.2)
        return log.read_text(encoding="utf-8")

    def _answers(self, port: str) -> bool:
        import requests

        url = f"http://127.0.0.1:{port}/"
        try:
            return requests.get(url + "health", timeout=5).status_code != 503  # it loads
        except requests.RequestException:
            return False

    def clear(self) -> None:
        """End what serves."""
        while self.behind:
            process = self.behind.pop()
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
