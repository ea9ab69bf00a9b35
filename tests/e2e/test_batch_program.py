"""llm.serving.batch as users call it: ended early, gone on with, with the answers of the engine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TINY = "__internal_testing__/tiny-random-llama"
PROMPTS = [f"prompt {number}" for number in range(24)]


def start(tmp_path):
    command = [sys.executable, "-m", "llm.serving.batch", "--model_name_or_path", TINY]
    command += ["--input_file", str(tmp_path / "asked.jsonl"), "--threads", "1"]
    command += ["--output_file", str(tmp_path / "said.jsonl"), "--max_num_seqs", "2"]
    return subprocess.Popen(command, cwd=REPO, env=os.environ, stderr=subprocess.PIPE, text=True)


def test_a_batch_that_was_ended_goes_on_to_the_answers_of_the_engine(tmp_path):
    from llm.engine.offline import LLM
    from llm.engine.request import SamplingParams

    body = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    asked = [
        {
            "custom_id": prompt,
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": prompt, **body},
        }
        for prompt in PROMPTS
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    partial = tmp_path / "said.jsonl.partial"
    running = start(tmp_path)
    end = time.monotonic() + 100
    while not partial.exists() or partial.read_bytes().count(b"\n") < 3:
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[1]
    kept = partial.read_text().splitlines()
    assert running.returncode == 128 + signal.SIGTERM and 3 <= len(kept) < len(PROMPTS)
    assert f"stopped: {len(kept)} of {len(PROMPTS)} answers are in {partial}" in said
    assert "Traceback" not in said and "FatalError" not in said, said
    running = start(tmp_path)
    said = running.communicate(timeout=100)[1]
    assert running.returncode == 0, said
    assert f"{len(kept)} of {len(PROMPTS)} requests are answered already" in said
    lines = (tmp_path / "said.jsonl").read_text().splitlines()
    assert set(kept) <= set(lines), "what was answered is not asked again"
    rows = [json.loads(line) for line in lines]
    assert [row["custom_id"] for row in rows] == PROMPTS
    params = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)
    answers = LLM(TINY, threads=1).generate(PROMPTS, params, progress=False)
    found = [row["response"]["body"]["choices"][0]["text"] for row in rows]
    assert found == [answer.text for answer in answers]
