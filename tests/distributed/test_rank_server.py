"""The server that the other tests of this directory run on."""

import subprocess
import sys
import time

import pytest

from tests.distributed.forked_scripts import ForkedScript
from tests.distributed.rank_server import RankError


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_values_come_back_by_rank(ranks, count):
    found = ranks(count, "jobs_server:echo", {"a": [1, None]})
    assert [value["rank"] for value in found] == list(range(count))
    assert all(value["value"] == {"a": [1, None]} for value in found)
    assert all(value["ranks"] == count and value["paddle"] for value in found)


def test_failure_shows_what_every_rank_said_and_ends_the_others(ranks):
    start = time.monotonic()
    with pytest.raises(RankError, match="planted on rank 1") as caught:
        ranks(2, "jobs_server:fail_on", 1)
    assert time.monotonic() - start < 20
    assert "exit codes [-9, 1]" in str(caught.value)
    assert "in fail_on" in str(caught.value).split("--- rank 1")[0]


def test_late_ranks_are_killed_with_their_stacks(ranks):
    with pytest.raises(RankError, match=r"did not end within 0\.5 s") as caught:
        ranks(2, "jobs_server:sleep", 60, timeout=0.5)
    assert str(caught.value).count("in sleep") == 2
    assert ranks(1, "jobs_server:echo", 1)[0]["value"] == 1


SCRIPT = """
import atexit, os, sys, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
print(__name__, sys.argv, os.getcwd(), repr(sys.stdin.read()))
print("to stderr", file=sys.stderr)
if sys.argv[1] == "raise":
    raise KeyError("planted")
sys.exit({"text": "said", "number": 7, "none": None}[sys.argv[1]])
"""


@pytest.mark.parametrize("end", ["none", "number", "text", "raise"])
def test_a_forked_script_does_what_a_process_does(ranks, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words, place = [script, end], tmp_path
    alone = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    forked = ForkedScript(ranks, words, place).read()
    assert forked.returncode == alone.returncode
    assert forked.stdout == alone.stdout and "at exit" in alone.stdout
    if end == "raise":
        assert forked.stderr.splitlines()[-1] == alone.stderr.splitlines()[-1] != ""
    else:
        assert forked.stderr == alone.stderr != ""
