"""What those who run a server need, on real sockets: its own port, keys, SIGHUP, a burst."""

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from serving_process import ServerProcess, fake_server, free_port

PROMPT = {"prompt": "x"}


def ask(server: ServerProcess, key: str = "none", **body: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return requests.post(
        f"{server.url}/v1/completions", json={**PROMPT, **body}, headers=headers, timeout=30
    )


def test_a_port_for_those_who_run_it(tmp_path: Path) -> None:
    port = free_port()
    flags = (f"--management_port={port}", "--management_host=127.0.0.2")
    go = tmp_path / "go"
    with fake_server(tmp_path, *flags, "--api_key=the-one-key", load_until=str(go)) as server:
        url = f"http://127.0.0.2:{port}"
        deadline = time.monotonic() + 20
        while True:
            try:
                live = requests.get(f"{url}/health/live", timeout=5)
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert (live.status_code, live.json()["status"]) == (200, "loading")
        assert requests.get(f"{url}/health/ready", timeout=5).status_code == 503
        go.touch()
        server.wait_until_ready()
        assert requests.get(f"{url}/health/ready", timeout=5).json() == {"status": "ok"}
        assert ask(server, "the-one-key").ok
        text = requests.get(f"{url}/metrics", timeout=5).text
        assert "vllm:time_to_first_token_seconds_count" in text
        assert "engine_process_resident_memory_bytes" in text
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}/health", timeout=5)
        refused = requests.post(f"{url}/v1/load_lora_adapter", json={}, timeout=5)
        assert refused.status_code == 403 and "--adapter_dir" in refused.text
        assert server.stop() == 0


def test_sighup_reads_keys_and_opens_the_log_again(tmp_path: Path) -> None:
    keys, log = tmp_path / "keys.yaml", tmp_path / "access.log"
    keys.write_text("- {name: alice, key: sk-alice-1234}\n")
    with fake_server(tmp_path, f"--api_keys={keys}", f"--access_log={log}") as server:
        server.wait_until_ready()
        assert ask(server, "sk-alice-1234").status_code == 200
        assert ask(server, "sk-bob-5678").status_code == 401
        keys.write_text("- {name: bob, key: sk-bob-5678}\n")
        log.rename(tmp_path / "access.log.1")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("1 keys from")
        assert ask(server, "sk-alice-1234").status_code == 401
        assert ask(server, "sk-bob-5678").status_code == 200
        assert server.stop() == 0
    before, after = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "access.log.1", log)
    )
    assert [(line.get("key"), line["status"]) for line in before] == [("alice", 200), (None, 401)]
    assert [(line.get("key"), line["status"]) for line in after] == [(None, 401), ("bob", 200)]


def test_a_burst_of_a_hundred_clients_is_taken(tmp_path: Path) -> None:
    """Every limit at its default: all connect at one moment, and all get their own answer."""
    together = threading.Barrier(100)
    with fake_server(tmp_path, answer="hello world", delay=0.005) as server:
        server.wait_until_ready()

        def one(number: int) -> tuple[int, str]:
            together.wait()
            answer = ask(server, max_tokens=2, user=str(number))
            return answer.status_code, answer.json()["choices"][0]["text"]

        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(one, range(100)))
        assert set(answers) == {(200, "hello world")}
        assert server.metric("vllm:request_success_total", finished_reason="length") == 100
        assert server.metric("vllm:num_requests_waiting") == 0


def test_a_key_holds_its_limit_under_a_burst(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "- {name: few, key: sk-few-1234, requests_per_minute: 7}\n"
        "- {name: short, key: sk-short-1234, tokens_per_minute: 100}\n"
    )
    with fake_server(tmp_path, f"--api_keys={keys}", answer="hello world") as server:
        server.wait_until_ready()
        with ThreadPoolExecutor(20) as pool:
            few = list(pool.map(lambda _: ask(server, "sk-few-1234"), range(30)))
            short = list(pool.map(lambda _: ask(server, "sk-short-1234", max_tokens=30), range(30)))
        assert sorted(one.status_code for one in few) == [200] * 7 + [429] * 23
        assert all(int(one.headers["Retry-After"]) <= 60 for one in few if one.status_code == 429)
        used = sum(one.json()["usage"]["total_tokens"] for one in short if one.ok)
        assert 0 < used <= 100
        assert {one.status_code for one in short} == {200, 429}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--api_keys={out}/none.yaml"], "none.yaml"),
        (["--access_log={out}/no/where.log"], "where.log"),
        (["--management_port={port}", "--adapter_dir={out}/none"], "adapter_dir=.*is no directory"),
        (["--management_port={taken}"], "management_port={taken} is in use"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"out": str(tmp_path), "port": free_port(), "taken": taken.getsockname()[1]}
        words = [word.format(**values) for word in flags]
        with fake_server(tmp_path, *words, load_seconds=60) as server:
            assert server.process.wait(20) == 2
            assert message.format(**values).split(".*")[0] in server.log.read_text()
