"""The server on real sockets, with a fake model: streaming, clients that leave, limits, signals."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from serving_process import REPO, ServerProcess, fake_server, free_port

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
ENDLESS = {"repeat": True, "max_model_len": 1_000_000}
LONG = ("--max_length=500000",)


def post(server: ServerProcess, body: dict[str, Any], **options: Any) -> requests.Response:
    return requests.post(f"{server.url}/v1/completions", json=body, timeout=20, **options)


def test_chunks_arrive_one_by_one(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    with fake_server(tmp_path, answer="abcdef", gate=str(gate)) as server:
        server.wait_until_ready()
        (gate / "0").touch()
        arrivals = []
        with post(server, {"prompt": "x", "stream": True}, stream=True) as response:
            for line in response.iter_lines(chunk_size=1):
                if line.startswith(b"data: {"):
                    arrivals.append(json.loads(line[6:])["choices"][0]["text"])
                    # The next token is made only now: a server that collects chunks, or holds the
                    # first one back, would leave the reader waiting for ever.
                    (gate / str(len(arrivals))).touch()
    assert arrivals == [*"abcdef", ""]


def streaming_request(server: ServerProcess, stream: bool) -> socket.socket:
    body = json.dumps({"prompt": "x", "max_tokens": 400_000, "stream": stream})
    client = socket.create_connection(("127.0.0.1", server.port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(tmp_path: Path, stream: bool) -> None:
    with fake_server(tmp_path, *LONG, delay=0.05, **ENDLESS) as server:
        server.wait_until_ready()
        client = streaming_request(server, stream)
        server.wait_for_metric(RUNNING, 1)
        client.close()
        assert server.wait_for_metric(RUNNING, 0) < 1
        assert post(server, {"prompt": "x", "max_tokens": 2}).ok, "the next one is served"
        assert server.metric("vllm:request_success_total", finished_reason="abort") == 1


def test_a_client_that_leaves_the_line_is_not_generated_for(tmp_path: Path) -> None:
    with fake_server(tmp_path, "--max_num_seqs=1", *LONG, delay=0.05, **ENDLESS) as server:
        server.wait_until_ready()
        first, second = streaming_request(server, True), None
        server.wait_for_metric(RUNNING, 1)
        second = streaming_request(server, False)
        server.wait_for_metric(WAITING, 1)
        second.close()
        server.wait_for_metric(WAITING, 0)
        assert server.metric(RUNNING) == 1, "the first one goes on"
        first.close()
        server.wait_for_metric(RUNNING, 0)


def test_a_full_line_and_the_health_beside_it(tmp_path: Path) -> None:
    narrow = ("--max_num_seqs=1", "--max_queue=1")
    with fake_server(tmp_path, *narrow, *LONG, delay=0.05, **ENDLESS) as server:
        server.wait_until_ready()
        clients = [streaming_request(server, True)]
        server.wait_for_metric(RUNNING, 1)
        clients.append(streaming_request(server, True))
        server.wait_for_metric(WAITING, 1)
        refused = post(server, {"prompt": "x", "stream": True})
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        assert "limit is 1 (--max_queue)" in refused.json()["error"]["message"]
        assert requests.get(f"{server.url}/health", timeout=1).ok
        for client in clients:
            client.close()


def test_parallel_clients_all_get_their_answers(tmp_path: Path) -> None:
    with fake_server(tmp_path, answer="hello world", delay=0.005) as server:
        server.wait_until_ready()
        answers: list[str] = []

        def ask() -> None:
            body = post(server, {"prompt": "x"}).json()
            answers.append(body["choices"][0]["text"])

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == ["hello world"] * 12


def test_health_while_loading(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with fake_server(tmp_path, load_until=str(go)) as server:
        deadline = time.monotonic() + 20
        while True:
            try:
                loading = requests.get(f"{server.url}/health", timeout=5)
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert (loading.status_code, loading.json()) == (503, {"status": "loading"})
        assert post(server, {"prompt": "x"}).status_code == 503
        go.touch()
        server.wait_until_ready()
        assert requests.get(f"{server.url}/health", timeout=5).json() == {"status": "ok"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly_while_it_generates(tmp_path: Path, number: int) -> None:
    with fake_server(tmp_path, *LONG, "--drain_seconds=0.5", delay=0.05, **ENDLESS) as server:
        server.wait_until_ready()
        with post(server, {"prompt": "x", "max_tokens": 9999, "stream": True}, stream=True) as r:
            lines = r.iter_lines(chunk_size=1)
            next(lines)
            begin = time.monotonic()
            server.process.send_signal(number)
            rest = [line for line in lines if line]
        assert server.process.wait(10) == 0
        assert time.monotonic() - begin < 10, "the answer would take minutes"
        assert b"the server is stopping" in rest[-2], "the client hears why"
        assert rest[-1] == b"data: [DONE]"
        assert "Traceback" not in server.log.read_text()


def test_a_signal_ends_it_while_it_loads(tmp_path: Path) -> None:
    with fake_server(tmp_path, load_seconds=2) as server:
        deadline = time.monotonic() + 20
        while True:
            try:
                requests.get(f"{server.url}/health", timeout=5)
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def test_what_stops_it_from_starting(tmp_path: Path) -> None:
    with fake_server(tmp_path, load_error="the weights are damaged; export again") as server:
        assert server.process.wait(20) == 2
        assert "error: the weights are damaged; export again" in server.log.read_text()


@pytest.mark.parametrize("flag", ["flask_port", "port"])
def test_a_port_in_use_is_told_before_loading(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"port": free_port(), "flask_port": free_port(), flag: port}
        result = subprocess.run(
            [sys.executable, str(REPO / "tests/unit/serving/fake_server.py")]
            + [json.dumps({"load_error": "loading has begun"})]
            + [f"--{name}={value}" for name, value in ports.items()],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert result.returncode == 2
    message = f"error: {flag}={port} is in use on 127.0.0.1; stop what listens there, or choose"
    assert message in result.stderr
    assert "loading has begun" not in result.stderr


def raw(server: ServerProcess, request: Callable[[http.client.HTTPConnection], None]) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    request(connection)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_bodies_on_the_wire(tmp_path: Path) -> None:
    with fake_server(tmp_path, "--max_body_bytes=2000", answer="ok") as server:
        server.wait_until_ready()
        too_large = post(server, {"prompt": "x" * 3000})
        assert too_large.status_code == 413
        assert "limit of 2000 bytes (--max_body_bytes)" in too_large.json()["error"]["message"]

        head = {"Content-Type": "application/json", "Content-Length": "9" * 12}
        huge, _ = raw(server, lambda c: c.request("POST", "/v1/completions", headers=head))
        assert huge.status == 413, "refused from its length alone, without reading it"

        def chunked(connection: http.client.HTTPConnection) -> None:
            connection.request(
                "POST",
                "/v1/completions",
                body=iter([b'{"prompt": ', b'"x"}']),
                headers={"Content-Type": "application/json"},
                encode_chunked=True,
            )

        response, body = raw(server, chunked)
        assert (response.status, json.loads(body)["choices"][0]["text"]) == (200, "ok")


def test_no_ui_does_not_import_gradio_or_training_code(repo: Path) -> None:
    script = (
        "import sys, threading\n"
        "sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/unit/serving']\n"
        "import server\n"
        "from fakes import FakeTokenizer, make_served\n"
        "from llm.config.serving import ServerArguments\n"
        "from llm.serving import service\n"
        "import os, signal\n"
        "def load():\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    return make_served()\n"
        "service.serve(ServerArguments(no_ui=True, flask_port=0), load, FakeTokenizer())\n"
        "heavy = {'gradio', 'paddlenlp', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print('done')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(repo)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.stdout == "done\n", result.stderr


def test_help_names_the_flags(repo: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(repo / "server.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "--flask_port" in result.stdout
    assert "--model_prefix" in result.stdout


def test_page_and_api_behind_a_key_end_together(tmp_path: Path) -> None:
    with fake_server(tmp_path, "--api_key=sesame", page=True, answer="ok") as server:
        server.wait_for_log("chat page ready")
        assert post(server, {"prompt": "x"}).status_code == 401
        key = {"Authorization": "Bearer sesame"}
        assert post(server, {"prompt": "x"}, headers=key).ok
        assert requests.get(server.page_url, timeout=10).ok
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()
        with pytest.raises(requests.ConnectionError):
            requests.get(server.page_url, timeout=5)
        assert "sesame" not in server.log.read_text()
