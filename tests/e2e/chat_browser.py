"""A real browser on the chat page, in front of the real API on a fake model."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_process import REPO, ServerProcess, free_port

sys.path.insert(0, str(REPO / "tests" / "unit" / "serving"))

from fakes import FakeEngine, LocalWorker, make_served

from llm.serving.api import create_app
from llm.serving.keys import Keys
from llm.serving.listening import listen
from llm.serving.requests import Limits
from llm.serving.web import ApiSettings
from llm.serving.wsgi import HttpServer, Site

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS = 30_000  # playwright counts in milliseconds


_LIMITS = 100_000, 100_000


class Api:
    """The API in this process: tests see what reaches the engine and change its answers."""

    def __init__(self) -> None:
        self.served = make_served(max_model_len=1_000_000)
        self.served.model.runner.adapters = SimpleNamespace(names=("pirate",))
        self.worker = LocalWorker(lambda: self.served)
        self.worker.start()
        self.worker.wait_loaded()
        self.port = free_port()
        self.start()

    def start(self, key: str | None = None, limits: tuple[int, int] = _LIMITS) -> None:
        self.is_usual = key is None and limits == _LIMITS
        app = create_app(self.worker, ApiSettings(Limits(*limits, "hermes"), keys=Keys(single=key)))
        site = Site(app, listen("127.0.0.1", self.port, "flask_port"))
        self.http = HttpServer([site], max_requests=8, max_body_bytes=1 << 20)
        self.http.start()

    def restart(self, **how: Any) -> None:
        self.http.stop()
        self.start(**how)

    @property
    def engine(self) -> FakeEngine:
        return self.served.engine

    def answers(self, text: str, **how: Any) -> None:
        self.engine.answer = self.served.model.tokenizer.encode(text)
        self.engine.repeat, self.engine.delay, self.engine.fail_at = False, 0.0, None
        vars(self.engine).update(how)

    def asked(self, number: int = -1) -> str:
        """What the engine was given, as text."""
        return self.served.model.tokenizer.decode(self.engine.calls[number][0])


def running_api() -> Iterator[Api]:
    """Yield an API, where there is a browser to go in front of it."""
    pytest.importorskip("playwright", reason="playwright is not installed (requirements-dev.txt)")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    api = Api()
    yield api
    api.worker.close()
    api.http.stop()


def page_server(api_url: str, directory: Path, *flags: str) -> ServerProcess:
    """Start the page's process alone."""
    port = free_port()
    command = [sys.executable, "-m", "llm.serving.page.ui", f"--api_url={api_url}"]
    command += [f"--port={port}", "--until_stdin_closes", *flags]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPO), before)))
    try:
        return ServerProcess(command, directory / "page.log", port, page_port=port)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


class Tab:
    """A tab on the page; counts what leaves for other hosts, and what the page's code throws."""

    def __init__(self, context: Any, url: str) -> None:
        self.page, self.url = context.new_page(), url
        self.foreign: list[str] = []
        self.thrown: list[str] = []
        self.page.on("request", self._seen)
        self.page.on("pageerror", lambda error: self.thrown.append(str(error)))

    def _seen(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:")):
            self.foreign.append(request.url)

    def goto(self, place: str = "") -> "Tab":
        self.page.goto(self.url + place)
        self.is_in("ok")
        return self

    def is_in(self, state: str) -> None:
        # The page asks when its tab comes to the front, too.
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        self.page.locator(f'#status[data-state="{state}"]').wait_for(timeout=SECONDS)

    def reload(self) -> None:
        self.page.reload()
        self.is_in("ok")

    def send(self, text: str) -> None:
        self.page.fill("#message", text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str, answer: str) -> None:
        """Send a question and wait until its answer is there and the next may be sent."""
        self.send(text)
        wait_for(lambda: self.answer == answer and self.questions[-1:] == [text], f"{answer!r}")
        self.idle()

    def idle(self) -> None:
        self.page.locator("#send").wait_for(timeout=SECONDS)

    @property
    def questions(self) -> list[str]:
        return self.page.locator(".turn.user .typed").all_text_contents()

    @property
    def answer(self) -> str:
        return str(
            self.page.evaluate(
                "[...document.querySelectorAll('.turn.assistant .body')].at(-1)?.textContent ?? ''"
            )
        ).strip()

    @property
    def answers(self) -> list[str]:
        return [t.strip() for t in self.page.locator(".turn.assistant .body").all_text_contents()]

    @property
    def notes(self) -> list[str]:
        return [text.strip() for text in self.page.locator(".turn .note").all_text_contents()]

    @property
    def draft(self) -> str:
        return str(self.page.input_value("#message"))

    def do(self, name: str, where: str = ".turn >> nth=-1") -> None:
        self.page.locator(where).locator(f".do-{name}").click()

    def close(self) -> None:
        self.page.close()
        assert not self.thrown, self.thrown
        assert not self.foreign, "the page works without the internet"
