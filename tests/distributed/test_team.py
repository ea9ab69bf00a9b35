"""A leader and followers: when one ends, all do; the server over two processes."""

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from llm.config.generation import OpenArguments
from llm.engine.finding import find_model
from llm.engine.opening import open_model
from llm.engine.request import Request, SamplingParams
from llm.llama.config import TINY_NAME
from tests.distributed.rank_server import Job, free_port

LIMIT_S = 30.0
ENDED = 75  # of ranks that end because another one failed


@pytest.fixture(scope="module")
def alone():
    """What one process answers to two tokens."""
    place = OpenArguments(model_name_or_path=TINY_NAME, device="cpu")
    place.validate()
    model = open_model(place, find_model(place))
    params = SamplingParams(max_new_tokens=30, temperature=0, ignore_eos=True)
    return model, [t.token_id for t in model.open_engine(1, 64).stream(Request([5, 17], params))]


@pytest.mark.parametrize(
    ("mishap", "rank", "cause"),
    [
        ("killed", 0, "was killed (SIGKILL"),
        ("killed", 1, "was killed (SIGKILL"),
        ("raised", 0, "failed: RuntimeError: planted: no memory"),
    ],
)
def test_one_that_ends_takes_all_down_with_one_message(ranks, tmp_path, alone, mishap, rank, cause):
    file = tmp_path / "answer.txt"
    answer = ranks.run(Job(2, "jobs_team:answer", [mishap, rank, str(file)], LIMIT_S))
    said = "\n".join(answer["tails"])
    assert not answer["late"] and answer["seconds"] < LIMIT_S / 2, said
    assert all(answer["codes"]) and answer["codes"][1 - rank] == ENDED, said
    (message,) = [line for line in said.splitlines() if line.startswith("job ended: ")]
    assert f"rank {rank} on " in message and cause in message
    assert "Error" not in answer["tails"][0].replace(message, ""), said


def test_a_signal_ends_all_after_the_step_that_is_computed(ranks, tmp_path, alone):
    file = tmp_path / "answer.txt"
    answer = ranks.run(Job(2, "jobs_team:answer", ["told_to_stop", 0, str(file)], LIMIT_S))
    said = "\n".join(answer["tails"])
    assert answer["codes"] == [128 + signal.SIGTERM, 0], said
    assert "job ended" not in said and "Error" not in said
    assert (tmp_path / "answer.txt.through").exists()
    kept = list(map(int, file.read_text(encoding="utf-8").split()))
    assert 0 < len(kept) < 30 and kept == alone[1][: len(kept)]


def post(port, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=30)


def wait_until(ready, seconds=LIMIT_S):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def healthy(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_server_over_two_processes(ranks, tmp_path, alone):
    port = free_port()
    words = ["server.py", "--device", "cpu", "--model_name_or_path", TINY_NAME, "--no_ui"]
    words += [
        "--flask_port",
        str(port),
        "--src_length",
        "100",
        "--draft_model_name_or_path",
        TINY_NAME,
    ]
    job = Job(2, "jobs_team:script", [[*words], str(tmp_path)], 60.0)
    found = {}
    thread = threading.Thread(target=lambda: found.update(ranks.run(job)))
    thread.start()
    wait_until(lambda: healthy(port) or not thread.is_alive())
    model, _ = alone
    ids = model.tokenizer.encode("The sky is", add_bos=True)
    params = SamplingParams(max_new_tokens=20, temperature=0)
    (expected,) = model.open_engine(1, 64).generate([Request(ids, params)])
    body = {"prompt": "The sky is", "max_tokens": 20, "temperature": 0}
    text = json.load(post(port, body))["choices"][0]["text"]
    assert text == model.text(expected.ids, ids)
    pids = [int((tmp_path / str(rank)).read_text(encoding="utf-8")) for rank in (0, 1)]
    before = cpu_seconds(pids[1])
    time.sleep(0.5)
    assert cpu_seconds(pids[1]) - before <= 0.05, "a follower sleeps while it waits"
    with post(port, {**body, "max_tokens": 400, "stream": True, "ignore_eos": True}) as stream:
        stream.readline()
        for _ in range(3):  # as the launcher does, which sends them to the followers too
            for rank in (0, 1):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[rank], signal.SIGTERM)
            time.sleep(0.1)
        assert stream.read().endswith(b"data: [DONE]\n\n"), "what runs may end"
    thread.join(LIMIT_S)
    said = "\n".join(found["tails"])
    assert found["codes"] == [0, 0] and "job ended" not in said and "Error" not in said, said
