"""A rank that dies, fails or hangs ends the job with one message; SIGTERM stops all at one step."""

import subprocess
import sys
import time

import pytest

from llm.parallel import faults, sentry, topology
from tests.distributed.rank_server import REPO, Job

LIMIT_S = 30.0


def run(ranks, tmp_path, mishap, rank, *, count=2, timeout_s=60.0):
    job = Job(count, "jobs_faults:train", [str(tmp_path), mishap, rank, 5, timeout_s], LIMIT_S)
    answer = ranks.run(job)
    assert not answer["late"], answer["tails"]
    said = [line for tail in answer["tails"] for line in tail.splitlines()]
    ends = [line for line in said if line.startswith("job ended: ")]
    return answer, ends


@pytest.mark.parametrize(
    ("mishap", "rank", "cause"),
    [
        ("killed", 1, "was killed (SIGKILL"),
        ("killed", 0, "was killed (SIGKILL"),
        ("crashed", 1, "crashed (Segmentation fault"),
        ("raised", 1, "failed: RuntimeError: planted: the disk is full"),
        ("raised", 0, "failed: RuntimeError: planted: the disk is full"),
        ("unwatched", 1, "the process that watches it ended"),
    ],
)
def test_a_rank_that_ends_takes_the_job_down_with_one_message(ranks, tmp_path, mishap, rank, cause):
    answer, ends = run(ranks, tmp_path, mishap, rank)
    assert answer["seconds"] < LIMIT_S
    assert len(ends) == 1, answer["tails"]
    assert f"rank {rank} on " in ends[0] and cause in ends[0]
    assert (tmp_path / "failure.txt").read_text().strip() == ends[0]
    assert all(answer["codes"])
    # No other rank's failed collective drowns the message.
    assert "PeerLostError" not in answer["tails"][1 - rank]


def test_what_every_rank_refuses_is_not_said_again(ranks, tmp_path):
    answer, ends = run(ranks, tmp_path, "refused", -1)
    assert answer["codes"] == [1, 1] and not ends, answer["tails"]
    assert all("UserError: planted" in tail for tail in answer["tails"])
    time.sleep(2 * (sentry.SETTLE_S + sentry.TICK_S))  # the sentries outlive the ranks
    assert not (tmp_path / "failure.txt").exists()


def test_a_hang_shows_where_each_rank_is(ranks, tmp_path):
    answer, ends = run(ranks, tmp_path, "stuck_in_python", 1, timeout_s=3.0)
    assert len(ends) == 1 and "within 3 s (last step: 5)" in ends[0]
    message = (tmp_path / "failure.txt").read_text()
    first, second = message.split("rank 1 on ")
    assert "rank 0 on" in first and "in all_reduce" in first and "in train" in first
    assert "in stuck_in_python" in second and "in train" in second
    assert all(answer["codes"])


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_stops_all_ranks_at_the_same_step(ranks, tmp_path, count):
    answer, ends = run(ranks, tmp_path, "told_to_stop", count - 1, count=count)
    assert answer["codes"] == [0] * count and not ends
    assert answer["values"] == [5] * count
    assert not list(tmp_path.iterdir())


def test_the_limit_has_to_be_positive(tmp_path):
    limit = faults.guard(topology.single(), tmp_path, 0)
    with pytest.raises(ValueError, match="timeout_s 0: a time limit has to be positive"), limit:
        pass


def test_through_the_launcher(tmp_path):
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    command += ["--log_dir", str(tmp_path / "log")]
    command += ["tests/distributed/jobs_faults.py", str(tmp_path), "killed", "1"]
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0 and time.monotonic() - start < 60
    logs = "".join(file.read_text() for file in (tmp_path / "log").glob("workerlog.*"))
    assert logs.count("job ended: rank 1 on ") == 1, logs + done.stdout + done.stderr
    assert "was killed (SIGKILL" in (tmp_path / "failure.txt").read_text()
