"""The chat page in a real browser, in front of the real API on a fake model."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from serving_process import REPO, ServerProcess, free_port

sys.path.insert(0, str(REPO / "tests" / "unit" / "serving"))

from fakes import TEMPLATE, FakeEngine, make_served

from llm.serving.api import ApiSettings, create_app
from llm.serving.loop import EngineWorker
from llm.serving.requests import Limits
from llm.serving.wsgi import HttpServer

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

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


class Api:
    """The API in this process: tests see what reaches the engine and change its answers."""

    def __init__(self) -> None:
        self.served = make_served(max_model_len=1_000_000)
        self.worker = EngineWorker(lambda: self.served, max_queue=4)
        self.worker.start()
        self.worker.wait_loaded()
        self.port = free_port()
        self.start()

    def start(self) -> None:
        app = create_app(self.worker, ApiSettings(Limits(1000, 100_000)))
        self.http = HttpServer(
            app, host="127.0.0.1", port=self.port, max_requests=8, max_body_bytes=1 << 20
        )
        self.http.start()

    @property
    def engine(self) -> FakeEngine:
        return self.served.engine

    def answers(self, text: str, **how: Any) -> None:
        self.engine.answer = self.served.model.tokenizer.encode(text)
        self.engine.repeat, self.engine.delay = False, 0.0
        vars(self.engine).update(how)


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    pytest.importorskip("playwright", reason="playwright is not installed (requirements-dev.txt)")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    api = Api()
    yield api
    api.worker.close()
    api.http.stop()


@pytest.fixture(scope="module")
def page_server(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    port = free_port()
    log = tmp_path_factory.mktemp("page") / "page.log"
    command = [
        sys.executable,
        "-m",
        "llm.serving.page.ui",
        f"--api_url=http://127.0.0.1:{api.port}",
    ]
    os.environ["PYTHONPATH"] = str(REPO)
    command += [f"--port={port}", "--until_stdin_closes"]
    with ServerProcess(command, log, port, page_port=port) as process:
        process.wait_for_log("chat page ready")
        yield process
        process.process.stdin.close()
        assert process.process.wait(10) == 0, "the page ends with the process that started it"
        assert "Traceback" not in log.read_text()
    del os.environ["PYTHONPATH"]


@pytest.fixture(scope="module")
def browser(page_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1000, "height": 760},
        )
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, page_server: ServerProcess, api: Api) -> Iterator[Any]:
    """A fresh tab; every request that leaves for another host fails the test."""
    api.engine.calls.clear()
    api.served.model.tokenizer.chat_template = TEMPLATE
    tab = browser.new_page()
    foreign: set[str] = set()
    own = (page_server.page_url, page_server.page_url.replace("http", "ws"), "data:", "blob:")
    tab.on("request", lambda r: None if r.url.startswith(own) else foreign.add(r.url))
    # What the page's policy forbids never leaves the browser, though it is reported as a request.
    tab.on("requestfailed", lambda r: foreign.discard(r.url) if r.failure == "csp" else None)
    tab.goto(page_server.page_url)
    tab.locator("#message textarea").wait_for(timeout=SECONDS)
    tab.locator("#status strong").wait_for(timeout=SECONDS)
    yield tab
    tab.close()
    assert not foreign, "the page works without the internet"


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def send(page: Any, text: str) -> None:
    page.fill("#message textarea", text)
    page.keyboard.press("Enter")


def answer_text(page: Any) -> str:
    answers = page.locator("#chat .bot.message")
    return answers.last.inner_text().strip() if answers.count() else ""


def question_texts(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("#chat .user.message").all_inner_texts()]


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def test_type_and_stream(page: Any, api: Api, tmp_path: Path) -> None:
    words = "hello world hello world hello world hello world hello world"
    api.answers(words, delay=0.1)
    send(page, "What is this?")
    wait_for(lambda: answer_text(page) != "", "the answer begins")
    partial = answer_text(page)
    assert partial != words and words.startswith(partial), "it is shown while it is generated"
    assert button(page, "Stop").is_visible()
    assert page.input_value("#message textarea") == ""
    wait_for(lambda: answer_text(page) == words, "the whole answer")
    button(page, "Send").wait_for(timeout=SECONDS)
    assert question_texts(page) == ["What is this?"]
    picture = tmp_path / "chat.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 5000


def test_the_conversation_and_the_settings_reach_the_engine(page: Any, api: Api) -> None:
    api.answers("hello")
    page.get_by_role("button", name="Settings").click()
    page.fill("#system textarea", "Be brief.")
    page.get_by_label("number input for Temperature").fill("0.25")
    page.get_by_label("number input for Longest answer").fill("33")
    page.keyboard.press("Tab")
    send(page, "one")
    wait_for(lambda: answer_text(page) == "hello", "the first answer")
    button(page, "Send").wait_for(timeout=SECONDS)
    send(page, "two")
    wait_for(lambda: len(api.engine.calls) == 2 and len(question_texts(page)) == 2, "the second")
    ids, params = api.engine.calls[-1]
    assert api.served.model.tokenizer.decode(ids) == (
        "<system>Be brief.<user>one<assistant>hello<user>two<assistant>"
    )
    assert (params.temperature, params.max_new_tokens) == (0.25, 33)


def test_stop_frees_the_engine_and_retry_asks_again(page: Any, api: Api) -> None:
    api.answers("endless ", repeat=True, delay=0.02)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Longest answer").fill("90000")
    page.keyboard.press("Tab")
    for _ in range(5):  # with Gradio's `cancels` one stop in ten to twenty hid the chat
        send(page, "Go on")
        wait_for(lambda: len(answer_text(page)) > 20, "some text")
        button(page, "Stop").click()
        button(page, "Send").wait_for(timeout=SECONDS)
        button(page, "Clear").last.click()
        wait_for(lambda: question_texts(page) == [], "an empty page")
    send(page, "Go on")
    wait_for(lambda: len(answer_text(page)) > 20, "some text")
    button(page, "Stop").click()
    wait_for(lambda: api.engine.running == 0, "the engine stops", seconds=10)
    button(page, "Send").wait_for(timeout=SECONDS)
    kept = answer_text(page)
    assert kept.startswith("endless endless"), "what came stays"
    time.sleep(0.3)
    assert answer_text(page) == kept

    api.answers("a better one")
    button(page, "Retry").click()
    wait_for(lambda: answer_text(page) == "a better one", "the new answer")
    assert question_texts(page) == ["Go on"]
    decoded = api.served.model.tokenizer.decode(api.engine.calls[-1][0])
    assert decoded == "<user>Go on<assistant>", "the old answer is not part of the question"
    button(page, "Send").wait_for(timeout=SECONDS)


def test_undo_and_clear(page: Any, api: Api) -> None:
    api.answers("hello")
    send(page, "first")
    wait_for(lambda: answer_text(page) == "hello", "the answer")
    button(page, "Send").wait_for(timeout=SECONDS)
    button(page, "Undo").click()
    wait_for(lambda: question_texts(page) == [], "the question is taken back")
    assert page.input_value("#message textarea") == "first", "to be edited"
    page.locator("#message textarea").press("Enter")
    wait_for(lambda: answer_text(page) == "hello", "the answer again")
    button(page, "Send").wait_for(timeout=SECONDS)
    button(page, "Clear").click()
    wait_for(lambda: question_texts(page) == [] and answer_text(page) == "", "an empty page")
    send(page, "fresh")
    wait_for(lambda: answer_text(page) == "hello", "a new conversation")
    decoded = api.served.model.tokenizer.decode(api.engine.calls[-1][0])
    assert decoded == "<user>fresh<assistant>"


def test_clearing_while_an_answer_comes_in(page: Any, api: Api) -> None:
    api.answers("hello world " * 100, delay=0.05)
    send(page, "long")
    wait_for(lambda: len(answer_text(page)) > 10, "some text")
    button(page, "Clear").last.click()
    wait_for(lambda: api.engine.running == 0, "the engine stops", seconds=10)
    button(page, "Send").wait_for(timeout=SECONDS)
    time.sleep(0.3)
    assert question_texts(page) == [] and answer_text(page) == ""


def test_an_empty_message_is_not_sent(page: Any, api: Api) -> None:
    send(page, "   ")
    time.sleep(0.5)
    assert button(page, "Send").is_visible()
    assert question_texts(page) == []
    assert api.engine.calls == []


def test_closing_the_page_frees_the_engine(browser: Any, page: Any, api: Api) -> None:
    api.answers("endless ", repeat=True, delay=0.02)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Longest answer").fill("90000")
    page.keyboard.press("Tab")
    send(page, "Go on")
    wait_for(lambda: api.engine.running == 1, "it runs")
    browser.new_page()  # the context must keep a tab
    page.close()
    wait_for(lambda: api.engine.running == 0, "the engine stops")


def test_answers_cannot_load_things_from_elsewhere(page: Any, api: Api) -> None:
    api.answers("![x](https://example.com/x.png) <script>document.title='owned'</script>")
    send(page, "x")
    button(page, "Send").wait_for(timeout=SECONDS)
    wait_for(lambda: page.locator("#chat .bot.message").count() == 1, "the answer")
    assert page.title() != "owned"


def test_a_model_without_a_chat_template_continues_the_text(page: Any, api: Api) -> None:
    api.served.model.tokenizer.chat_template = None
    api.answers(" world")
    page.reload()
    page.get_by_text("no chat template: it continues your text").wait_for(timeout=SECONDS)
    send(page, "hello")
    wait_for(lambda: answer_text(page) == "world", "the continuation")
    assert api.served.model.tokenizer.decode(api.engine.calls[-1][0]) == "hello"


def test_an_engine_error_is_shown(page: Any, api: Api) -> None:
    api.answers("hello", fail_at=0)
    send(page, "x")
    page.get_by_text("RuntimeError: a kernel broke").wait_for(timeout=SECONDS)
    button(page, "Send").wait_for(timeout=SECONDS)
    assert page.input_value("#message textarea") == "x", "the question is given back"
    assert question_texts(page) == []
    api.engine.fail_at = None


def test_stopping_before_the_first_word_gives_the_question_back(page: Any, api: Api) -> None:
    api.answers("hello", delay=2.0)  # a slow machine has pressed Stop by then
    send(page, "slow?")
    wait_for(lambda: api.engine.running == 1, "it runs")
    button(page, "Stop").click()
    wait_for(lambda: page.input_value("#message textarea") == "slow?", "the question")
    assert question_texts(page) == []
    wait_for(lambda: api.engine.running == 0, "the engine stops")
    button(page, "Send").wait_for(timeout=SECONDS)


def test_api_down_and_back(page: Any, api: Api, page_server: ServerProcess) -> None:
    api.answers("hello")
    api.http.stop()
    send(page, "Anyone?")
    toast = page.get_by_text(f"The API at http://127.0.0.1:{api.port} does not answer")
    toast.wait_for(timeout=SECONDS)
    button(page, "Send").wait_for(timeout=SECONDS)
    assert page.input_value("#message textarea") == "Anyone?", "the question is not lost"
    api.start()
    assert requests.get(f"http://127.0.0.1:{api.port}/health", timeout=5).ok
    page.locator("#message textarea").press("Enter")
    wait_for(lambda: answer_text(page) == "hello", "the answer")
