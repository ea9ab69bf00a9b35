"""The server as Paddle's launcher starts it: over several processes, and what ends them."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from serving_process import ServerProcess, free_port

pytestmark = pytest.mark.long

PROMPTS = ["The token store", "a", "Weights are tied, and so are we. " * 3]
TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads that four processes can share."""
    from data.tokenizer import load_tokenizer
    from llm.llama.build import build_model, save_model
    from llm.llama.config import PRESETS, TINY_NAME

    tokenizer = load_tokenizer(TINY_NAME)
    config = PRESETS["tiny-random-llama"].replace(
        vocab_size=-(-tokenizer.vocab_size // 4) * 4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    network = build_model(config, seed=3)
    for name, parameter in network.named_parameters():
        if "norm" not in name:  # spread the logits, so that no choice hangs on rounding
            parameter.set_value(parameter * 10)
    place = tmp_path_factory.mktemp("model") / "shared"
    save_model(network, place)
    tokenizer.save(place)
    return place


def launched(model: Path, here: Path, repo: Path, count: int, *flags: str) -> ServerProcess:
    """Start it; the log of rank 0 is where the launcher puts it."""
    port = free_port()
    words = [sys.executable]
    if count > 1:
        words += ["-m", "paddle.distributed.launch", "--nproc_per_node", str(count)]
        words += ["--log_dir", str(here / "log")]
    words += [str(repo / "server.py"), "--device", "cpu", "--model_name_or_path", str(model)]
    words += ["--flask_port", str(port), "--no_ui", "--src_length", "100", *flags]
    return ServerProcess(words, here / "server.log", port)


def ids(server: ServerProcess) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        parameters = {"max_new_tokens": TOKENS, "details": True}
        body = {"inputs": prompt, "parameters": parameters}
        answer = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert answer.ok, answer.text
        found.append([token["id"] for token in answer.json()["details"]["tokens"]])
    return found


@pytest.fixture(scope="module")
def alone(model: Path, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    with launched(model, tmp_path_factory.mktemp("alone"), repo, 1) as server:
        server.wait_until_ready()
        found = ids(server)
        assert server.stop() == 0
    assert len(found[0]) == TOKENS
    return found


def ended(pids: list[int], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, f"some of {pids} still run"
        time.sleep(0.05)


def family(pid: int) -> list[int]:
    """A process and all that stem from it."""
    try:
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(one for child in own for one in family(int(child)))]


def ranks(server: ServerProcess) -> list[int]:
    """The processes of the ranks, by rank."""
    found: dict[int, int] = {}
    for pid in family(server.process.pid)[1:]:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [int(word[18:]) for word in words if word.startswith(b"PADDLE_TRAINER_ID=")]
        if rank:
            found.setdefault(rank[0], pid)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(params=[2, 4])
def shared(
    model: Path, repo: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    with launched(model, tmp_path, repo, request.param) as server:
        server.wait_until_ready()
        yield server


def test_greedy_ids_are_those_of_one_process(shared: ServerProcess, alone: list[list[int]]) -> None:
    assert ids(shared) == alone
    pids = family(shared.process.pid)
    status = shared.stop(seconds=40)
    ended(pids[1:])
    assert status in (0, -signal.SIGTERM, signal.SIGTERM, 128 + signal.SIGTERM)
    assert "job ended" not in shared.log.read_text()


@pytest.mark.parametrize("victim", ["leader", "follower", "http"])
def test_one_that_is_killed_takes_all_down(
    model: Path, repo: Path, tmp_path: Path, victim: str
) -> None:
    with launched(model, tmp_path, repo, 2) as server:
        server.wait_until_ready()
        pids = family(server.process.pid)
        leader, follower = ranks(server)
        (http_pid, *_) = [
            pid
            for pid in family(leader)[1:]
            if b"server.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill({"leader": leader, "follower": follower, "http": http_pid}[victim], signal.SIGKILL)
        assert server.process.wait(40) != 0
        ended(pids)
    said = server.log.read_text() + "".join(
        file.read_text(errors="replace") for file in (tmp_path / "log").glob("workerlog.*")
    )
    lines = {line for line in said.splitlines() if "job ended: " in line}
    if victim == "http":
        assert "the HTTP process ended unasked; the server ends" in said
    else:
        assert len(lines) == 1 and "was killed (SIGKILL" in lines.pop()


def test_drain_under_the_launcher(model: Path, repo: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path, repo, 2, "--max_length", "100") as server:
        server.wait_until_ready()
        pids = family(server.process.pid)
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 100, "stream": True}
        body["ignore_eos"] = True
        url = f"{server.url}/v1/completions"
        with requests.post(url, json=body, stream=True, timeout=60) as response:
            lines = response.iter_lines(chunk_size=1)
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == b"data: [DONE]" and b'"length"' in rest[-2]
        server.process.wait(40)
        ended(pids)
