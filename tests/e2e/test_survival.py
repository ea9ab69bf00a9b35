"""Answers of predict_generation.py that was ended early: none that was shown is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TINY = "__internal_testing__/tiny-random-llama"
PROMPTS = [f"\U0001f600 prompt {number}" for number in range(60)]
# What Paddle prints of a signal, and Python of an error.
STACKS = ("Traceback", "FatalError", "SIGTERM", "paddle::")


def predict(tmp_path, *words, length=60, **env):
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    command = [sys.executable, str(REPO / "predict_generation.py"), "--model_name_or_path", TINY]
    command += ["--data_file", str(tmp_path / "prompts.jsonl"), "--batch_size", "2"]
    command += [
        "--max_length",
        str(length),
        "--ignore_eos",
        "--device",
        "cpu",
        "--threads",
        "1",
        *words,
    ]
    return subprocess.Popen(
        command,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def wait_for_answers(place, count):
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if place.exists() and place.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    pytest.fail(f"no {count} answers in {place}")


def rows(place):
    text = place.read_text("utf-8")
    return [json.loads(line) for line in text.splitlines() if text.endswith("\n")]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_signal_loses_nothing_that_was_shown(name, tmp_path):
    out = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    running = predict(tmp_path, "--output_file", str(out), PYTHONIOENCODING="latin-1")
    wait_for_answers(partial, 3)
    number = getattr(signal, name)
    running.send_signal(number)
    shown, said = running.communicate(timeout=60)
    kept = rows(partial)
    assert not out.exists() and 3 <= len(kept) < len(PROMPTS)
    assert running.returncode == (-number if name == "SIGKILL" else 128 + number)
    for row in kept[: shown.count("> ? prompt")]:
        assert len(row["ids"]) == 60
    assert shown.count("> ? prompt") <= len(kept)
    if name != "SIGKILL":
        assert f"stopped: {len(kept)} of {len(PROMPTS)} answers are in {partial}" in said
        assert not any(stack in said for stack in STACKS), said


def test_nobody_reads_the_answers(tmp_path):
    running = predict(tmp_path, "--output_file", str(tmp_path / "out.jsonl"))
    running.stdout.readline()
    running.stdout.close()
    said = running.stderr.read()
    assert running.wait(60) == 141
    kept = rows(tmp_path / "out.jsonl.partial")
    assert kept and f"stopped: {len(kept)} of" in said
    assert not any(stack in said for stack in STACKS), said


def test_answers_go_down_standard_output_in_the_order_of_the_prompts(tmp_path):
    running = predict(tmp_path, "--output_file", "/dev/stdout", length=3)
    shown, _ = running.communicate(timeout=100)
    assert running.returncode == 0
    found = [json.loads(line)["prompt"] for line in shown.splitlines() if line.startswith("{")]
    assert found == PROMPTS
