"""The processes of a server: connections that do nothing, drain, and processes that are killed."""

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from serving_process import FAKE_SERVER, ServerProcess, fake_server, free_port

IDLE = 1000
ENDLESS = {"repeat": True, "max_model_len": 1_000_000, "delay": 0.05}
LONG = "--max_length=500000"


def children(server: ServerProcess) -> list[int]:
    """In the order in which they began; each thread has a list of its own."""
    lists = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return sorted(int(pid) for one in lists for pid in one.read_text().split())


def wait_until(ready: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def health_seconds(server: ServerProcess) -> float:
    begin = time.monotonic()
    assert requests.get(f"{server.url}/health", timeout=5).ok
    return time.monotonic() - begin


def test_idle_connections_and_slow_bodies_freeze_nothing(tmp_path: Path) -> None:
    """Silent ones, ones that are kept open after an answer, and bodies that do not come."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * IDLE), hard))
    clients: list[socket.socket] = []
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    began = {
        "silent": b"",
        "kept": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        "slow": f"{head}Content-Length: 100\r\n\r\n{{".encode(),
    }
    try:
        with fake_server(tmp_path, "--max_num_seqs=2", "--max_queue=2", answer="ok") as server:
            server.wait_until_ready()
            for number in range(IDLE):
                client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
                client.sendall(began[("silent", "kept", "slow")[number % 3]])
                clients.append(client)
            assert all(client.recv(12) == b"HTTP/1.1 200" for client in clients[1::3])
            assert max(health_seconds(server) for _ in range(5)) < 1
            body = {"prompt": "x"}
            answer = requests.post(f"{server.url}/v1/completions", json=body, timeout=5)
            assert answer.json()["choices"][0]["text"] == "ok"
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_no_http_is_refused_in_json(tmp_path: Path) -> None:
    with fake_server(tmp_path, answer="ok") as server:
        server.wait_until_ready()
        for sent in (b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: x\r\nHost: x\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
                client.sendall(sent)
                response = http.client.HTTPResponse(client)
                response.begin()
                assert response.status == 400
                assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
                assert client.recv(1) == b"", "and closed"


def stream(server: ServerProcess, tokens: int) -> requests.Response:
    body = {"prompt": "x", "max_tokens": tokens, "stream": True}
    return requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=20)


def test_drain_lets_streams_end_and_takes_nothing_new(tmp_path: Path) -> None:
    with fake_server(tmp_path, LONG, **ENDLESS) as server:
        server.wait_until_ready()
        with stream(server, 30) as response:
            lines = response.iter_lines(chunk_size=1)
            next(lines)
            for _ in range(3):  # as Paddle's launcher does
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            health = requests.get(f"{server.url}/health", timeout=5)
            assert (health.status_code, health.json()["status"]) == (503, "stopping")
            refused = stream(server, 1)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
            rest = [line for line in lines if line]
        assert rest[-1] == b"data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(5) == 0


def test_a_later_signal_ends_it_at_once(tmp_path: Path) -> None:
    with fake_server(tmp_path, LONG, **ENDLESS) as server:
        server.wait_until_ready()
        with stream(server, 9999) as response:
            lines = response.iter_lines(chunk_size=1)  # kept: where it goes, the client leaves
            next(lines)
            (http_pid,) = children(server)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(2.2)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) in (128 + signal.SIGTERM, -signal.SIGTERM)
        wait_until(lambda: not alive(http_pid))


def test_the_engine_is_killed(tmp_path: Path) -> None:
    with fake_server(tmp_path, answer="ok") as server:
        server.wait_until_ready()
        (http_pid,) = children(server)
        server.process.kill()
        wait_until(lambda: not alive(http_pid))
        said = server.log.read_text()
        assert said.count("the engine's process ended; the HTTP process ends with it") == 1
        assert "Traceback" not in said


@pytest.mark.parametrize("loading", [False, True])
def test_http_is_killed(tmp_path: Path, loading: bool) -> None:
    with fake_server(tmp_path, answer="ok", load_seconds=3 if loading else 0) as server:
        if loading:
            wait_until(lambda: len(children(server)) == 1)
        else:
            server.wait_until_ready()
        os.kill(children(server)[0], signal.SIGKILL)
        assert server.process.wait(10) == 1
        said = server.log.read_text()
        assert said.count("the HTTP process ended unasked; the server ends") == 1
        assert "Traceback" not in said


@pytest.mark.long
def test_the_page_is_killed_and_comes_back(tmp_path: Path) -> None:
    with fake_server(tmp_path, page=True, answer="ok") as server:
        server.wait_for_log("chat page ready")
        page = children(server)[-1]
        time.sleep(max(0.0, 10.5 - (time.monotonic() - server.started)))
        os.kill(page, signal.SIGKILL)
        server.wait_for_log("is started again")
        wait_until(lambda: server.log.read_text().count("chat page ready") == 2, 60)
        os.kill(children(server)[-1], signal.SIGKILL)
        server.wait_for_log("is not started again; the API goes on")
        assert requests.get(f"{server.url}/health", timeout=5).ok
        assert server.stop() == 0


@pytest.mark.long
def test_a_loop_as_supervisor_brings_it_back(tmp_path: Path) -> None:
    """Ten lines that start it again, whatever ended it."""
    port = free_port()
    words = [
        sys.executable,
        str(FAKE_SERVER),
        '{"answer": "ok"}',
        f"--flask_port={port}",
        "--no_ui",
    ]
    over, running, lives = threading.Event(), [], []

    def supervise() -> None:
        while not over.is_set():
            with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
                running[:] = [process]
                lives.append(process.wait())

    loop = threading.Thread(target=supervise)
    loop.start()

    def answers() -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        for killed in (None, "engine", "http"):
            if killed is not None:
                pid = running[0].pid
                child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
                count = len(lives)
                os.kill(pid if killed == "engine" else int(child), signal.SIGKILL)
                wait_until(lambda count=count: len(lives) > count)
            wait_until(answers)
    finally:
        over.set()
        running[0].terminate()
        loop.join(20)
    assert lives[:2] == [-signal.SIGKILL, 1]
