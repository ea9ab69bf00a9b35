"""The chat page under what takes long: answers of thousands of tokens, a proxy with TLS under a
sub-path, servers that end while it is open."""

import contextlib
import http.client
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from chat_browser import SECONDS, Api, Tab, page_server, wait_for
from serving_process import REPO, ServerProcess, fake_server, free_port

from tests.deploy_check import nginx

pytestmark = [pytest.mark.browser, pytest.mark.long, pytest.mark.timeout(280)]


@pytest.fixture
def context(chromium: Any, api: Api) -> Iterator[Any]:
    api.engine.calls.clear()
    context = chromium.new_context(locale="en-GB", ignore_https_errors=True)
    yield context
    context.close()


PARAGRAPH = "aaaa *bb* `c` d\n\n- e\n- f\n\n"


def test_the_page_keeps_up_with_an_answer(api: Api, context: Any, tmp_path: Path) -> None:
    """The time from a token's making to its sight, over 2,000 tokens at some 100 a second."""
    api.answers(PARAGRAPH * (2000 // len(PARAGRAPH)), delay=0.01)
    made: list[tuple[float, int]] = []

    def watch() -> None:
        while len(made) < 1_000_000 and not done.is_set():
            made.append(
                (time.monotonic(), max((h.position for h in api.engine.handles), default=0))
            )
            time.sleep(0.005)

    done = threading.Event()
    with page_server(f"http://127.0.0.1:{api.port}", tmp_path) as server:
        server.wait_for_log("chat page ready")
        tab = Tab(context, server.page_url).goto()
        threading.Thread(target=watch, daemon=True).start()
        tab.send("x")
        wait_for(lambda: tab.answer != "", "it begins")
        lags = []
        count = (
            "(document.querySelector('.turn.assistant .body').textContent.match(/[a-f]/g) ?? [])"
            ".length"
        )
        letters = [place for place, c in enumerate(PARAGRAPH * 100) if c in "abcdef"]
        while tab.page.locator("#stop").is_visible():
            seen, now = int(tab.page.evaluate(count)), time.monotonic()
            next_letter = letters[seen] + 1  # tokens that have to be made for one letter more
            since = next((at for at, position in made if position >= next_letter), now)
            lags.append(now - since)
            time.sleep(0.03)
        done.set()
        tab.close()
    assert len(lags) > 50
    lags.sort()
    print(f"lag: median {lags[len(lags) // 2]:.3f} s, most {lags[-1]:.3f} s of {len(lags)}")
    assert lags[int(len(lags) * 0.99)] <= 0.3


@pytest.mark.parametrize(
    "text", ["word " * 4000 + "\n", "line\n\n" * 3400, "```\n" + "x = 1\n" * 3300]
)
def test_twenty_thousand_tokens(api: Api, context: Any, tmp_path: Path, text: str) -> None:
    api.answers(text)
    with page_server(f"http://127.0.0.1:{api.port}", tmp_path) as server:
        server.wait_for_log("chat page ready")
        tab = Tab(context, server.page_url).goto()
        tab.send("x")
        tab.page.locator(".turn.assistant .do-retry").wait_for(timeout=120_000)
        assert "".join(tab.answer.split()) == "".join(text.replace("```", "").split()) or (
            "x=1" * 3300 in "".join(tab.answer.split())
        )
        begin = time.monotonic()
        tab.page.fill("#message", "still there")
        assert time.monotonic() - begin < 1, "the page still answers"
        tab.close()


def test_a_closed_page_frees_the_engine(api: Api, context: Any, tmp_path: Path) -> None:
    api.answers("endless ", repeat=True, delay=0.02)
    with page_server(f"http://127.0.0.1:{api.port}", tmp_path) as server:
        server.wait_for_log("chat page ready")
        tab = Tab(context, server.page_url).goto()
        tab.send("Go on")
        wait_for(lambda: api.engine.running == 1, "it runs")
        tab.close()
        time.sleep(20)
        assert api.engine.running == 1, "somebody may come back"
        wait_for(lambda: api.engine.running == 0, "the engine stops", seconds=15)
        tab = Tab(context, server.page_url).goto()
        tab.page.locator("#list .name").click()
        wait_for(lambda: "Interrupted. Continue" in tab.notes, "what came is kept")
        assert tab.answer.startswith("endless endless")
        tab.close()


def test_another_tab_takes_the_answer_of_a_closed_one_up(
    api: Api, context: Any, tmp_path: Path
) -> None:
    words = ("hello world " * 120).strip()
    api.answers(words, delay=0.03)
    with page_server(f"http://127.0.0.1:{api.port}", tmp_path) as server:
        server.wait_for_log("chat page ready")
        tab = Tab(context, server.page_url).goto()
        tab.send("one")
        wait_for(lambda: tab.answer != "", "it begins")
        other = Tab(context, tab.url).goto("/#" + tab.page.url.partition("/#")[2])
        wait_for(lambda: other.answer != "", "it is seen there")
        tab.close()
        wait_for(lambda: other.answer == words, "it goes on")
        other.idle()
        assert len(api.engine.calls) == 1 and "ended by itself" in other.page.inner_text(".meta")
        other.close()


def test_a_lost_connection_is_found_again(api: Api, context: Any, tmp_path: Path) -> None:
    words = ("hello world " * 120).strip()
    api.answers(words, delay=0.03)
    with page_server(f"http://127.0.0.1:{api.port}", tmp_path) as server, Relay(server) as relay:
        server.wait_for_log("chat page ready")
        tab = Tab(context, relay.url).goto()
        tab.send("one")
        wait_for(lambda: len(tab.answer) > 50, "it begins")
        for _ in range(2):
            shown = tab.answer
            relay.cut()
            wait_for(lambda before=shown: len(tab.answer) > len(before) + 50, "it goes on")
        wait_for(lambda: tab.answer == words, "the whole answer, and nothing of it twice")
        tab.idle()
        assert len(api.engine.calls) == 1
        tab.close()


class Relay:
    """Passes bytes on to the page, until its connections are cut."""

    def __init__(self, server: ServerProcess) -> None:
        self.target = int(server.page_url.rpartition(":")[2])
        self.sockets: list[socket.socket] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self.listening.accept()
                there = socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        while self.sockets:
            with contextlib.suppress(OSError):
                self.sockets.pop().shutdown(socket.SHUT_RDWR)


def test_server_and_page_end_and_begin_again_under_an_open_tab(
    chromium: Any, tmp_path: Path, context: Any
) -> None:
    with fake_server(tmp_path, page=True, answer="one", delay=0.01) as first:
        first.wait_for_log("chat page ready")
        first.wait_until_ready()
        tab = Tab(context, first.page_url).goto()
        tab.ask("1", "one")
        assert first.stop() == 0
        tab.is_in("page")
        tab.send("2")
        tab.page.get_by_text("The page's process does not answer").first.wait_for(timeout=SECONDS)
    port = int(first.page_url.rpartition(":")[2])
    with fake_server(tmp_path, page=True, page_port=port, answer="two", load_seconds=9):
        tab.is_in("loading")
        tab.is_in("ok")
        assert tab.questions == ["1", "2"]
        assert tab.page.locator(".turn .error").count() == 0, "mended"
        tab.do("retry")
        wait_for(lambda: tab.answers == ["one", "two"], "the answer")
        tab.reload()
        wait_for(lambda: tab.answers == ["one", "two"], "kept")
        tab.close()


@pytest.mark.parametrize("model", ["real-model", "demo/inference"])
def test_a_real_model(model: str, context: Any, tmp_path: Path) -> None:
    """What `make real-model` and `make demo` write, in front of server.py as users start it."""
    place = REPO / "outputs" / model
    if not place.exists():
        pytest.skip(f"no outputs/{model}")
    which = ["--model_dir"] if model.startswith("demo") else ["--model_name_or_path"]
    port, page_port = free_port(), free_port()
    command = [sys.executable, str(REPO / "server.py"), *which, str(place), "--device", "cpu"]
    command += [f"--port={page_port}", f"--flask_port={port}"]
    with ServerProcess(command, tmp_path / "server.log", port, page_port) as server:
        server.wait_for_log("chat page ready")
        server.wait_until_ready()
        begin = time.monotonic()
        tab = Tab(context, server.page_url).goto()
        paints = tab.page.evaluate("performance.getEntriesByType('paint').map(e => e.startTime)")
        print(
            f"{model}: first paint {paints[0]:.0f} ms, ready after {time.monotonic() - begin:.2f} s"
        )
        assert 0 < paints[0] <= 2000
        tab.page.fill("#set-temperature", "0")
        tab.page.fill("#set-max_tokens", "60")
        turns: list[dict[str, str]] = []
        for question in ("My name is Ada.", "What is my name?"):
            tab.send(question)
            tab.page.locator(".turn.assistant .do-retry").nth(len(turns) // 2).wait_for()
            tab.page.locator(".do-raw").last.click()
            turns.append({"role": "user", "content": question})
            body = {"messages": turns, "temperature": 0, "max_tokens": 60}
            said = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            turns.append(said["choices"][0]["message"])
            shown = tab.page.locator(".turn.assistant .plain").last.text_content()
            assert shown == turns[-1]["content"], "what the API answers, every space of it"
        tab.close()
        assert server.stop() == 0


def test_behind_the_nginx_of_deploy(api: Api, context: Any, tmp_path: Path) -> None:
    """As deploy/nginx.conf has it: TLS, and the page beside the API under ``/chat``."""
    for needed in ("nginx", "openssl"):
        if shutil.which(needed) is None:
            pytest.skip(f"no {needed} on this machine")
    words = "hello world " * 10
    api.answers(words, delay=0.05)
    with page_server(f"http://127.0.0.1:{api.port}", tmp_path, "--root_path=/chat") as server:
        server.wait_for_log("chat page ready")
        page_port = int(server.page_url.rpartition(":")[2])
        with nginx(tmp_path, [api.port, api.port], page_port) as (url, _):
            tab = Tab(context, f"{url}/chat").goto()
            tab.send("x")
            wait_for(lambda: tab.answer != "", "it begins")
            assert tab.answer != words.strip(), "nothing waits for the end"
            wait_for(lambda: tab.answer == words.strip(), "the answer")
            tab.idle()
            tab.page.fill("#message", "字" * 600_000)
            tab.page.keyboard.press("Enter")
            wait_for(lambda: len(tab.answers) == 2 and tab.notes != [], "the API's own words", 60)
            assert "bytes" in tab.notes[-1], "and not nginx's"
            tab.close()


class Proxy(BaseHTTPRequestHandler):
    """Shows the page under ``/chat`` over TLS; one takes the path off, the other passes it on."""

    protocol_version = "HTTP/1.1"
    page = ""
    takes_off = True

    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        path = self.path.removeprefix("/chat") if self.takes_off else self.path
        if not self.path.startswith("/chat"):
            self.send_error(404)
            return
        inner = http.client.HTTPConnection(self.page.removeprefix("http://"))
        inner.request(self.command, path or "/", self.rfile.read(size), dict(self.headers))
        response = inner.getresponse()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        while piece := response.read1(65536):
            self.wfile.write(piece)
            self.wfile.flush()
        self.close_connection = True

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {file}"
    )
    made = subprocess.run(command.split(), check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + made.stdout)
    return file


@pytest.mark.parametrize("takes_off", [True, False])
def test_under_a_path_of_a_proxy_with_tls(
    api: Api, context: Any, tmp_path: Path, certificate: Path, takes_off: bool
) -> None:
    api.answers("hello world " * 10, delay=0.05)
    with page_server(f"http://127.0.0.1:{api.port}", tmp_path, "--root_path=/chat") as server:
        server.wait_for_log("chat page ready")
        handler = type("Here", (Proxy,), {"page": server.page_url, "takes_off": takes_off})
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
        proxy.socket = tls.wrap_socket(proxy.socket, server_side=True)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        tab = Tab(context, f"https://127.0.0.1:{proxy.server_port}/chat").goto()
        tab.send("x")
        wait_for(lambda: tab.answer != "", "it begins")
        assert tab.answer != ("hello world " * 10).strip(), "nothing waits for the end"
        wait_for(lambda: tab.answer == ("hello world " * 10).strip(), "the answer")
        tab.idle()
        tab.reload()
        wait_for(lambda: tab.questions == ["x"], "kept")
        tab.close()
        proxy.shutdown()
