"""SIGKILL of one rank at random moments: what is left is always complete, right and newer."""

import json
import subprocess
import sys

MOMENTS = 20


def test_a_killed_rank_leaves_checkpoints_that_are_complete_and_right(repo, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.killed_ranks", str(tmp_path), str(MOMENTS)],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["resumed"]) == MOMENTS
    assert min(report["progress"]) >= 2, "saves at once, and saves in the background"
    # Rank 0 and others; in the middle of a save more often than not.
    assert set(report["victims"]) == {0, 1, 2, 3} and report["interrupted"] >= MOMENTS // 4
