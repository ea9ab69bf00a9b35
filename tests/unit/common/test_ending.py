"""Signals in the middle of imports, which make errors of their own of exceptions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]

# As numpy and pybind11 do.
SLOW = """
import sys, time
try:
    sys.stdout.write("importing\\n")
    sys.stdout.flush()
    time.sleep(60)
except BaseException as error:
    raise ImportError("you should not import this from its source directory") from error
"""
AT_THE_TOP = "from common.ending import run_script\nimport slow\nrun_script(lambda: None)\n"
WITHIN = "from common.ending import run_script\nrun_script(lambda: __import__('slow'))\n"


def interrupted(tmp_path: Path, text: str, number: int) -> tuple[int, str]:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "program.py").write_text(text)
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "importing\n"
    running.send_signal(number)
    said = running.communicate(timeout=20)[1]
    return running.returncode, said


@pytest.mark.parametrize("text", [AT_THE_TOP, WITHIN], ids=["at the top", "in main"])
def test_ctrl_c_is_one_line(text: str, tmp_path: Path) -> None:
    assert interrupted(tmp_path, text, signal.SIGINT) == (130, "interrupted\n")


def test_an_end_that_is_asked_for_is_quiet(tmp_path: Path) -> None:
    assert interrupted(tmp_path, AT_THE_TOP, signal.SIGTERM) == (-signal.SIGTERM, "")
    assert interrupted(tmp_path, WITHIN, signal.SIGTERM) == (128 + signal.SIGTERM, "")


def test_a_library_leaves_the_program_its_handlers(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text("from common.ending import run_script\n")
    program = "import library, signal; print(signal.getsignal(2) is signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{REPO}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"


def test_paddle_prints_no_stack_of_a_signal_during_its_import() -> None:
    program = (
        "import os, signal, sys; from common.ending import run_script\n"
        "def main():\n"
        "    from common import ending\n"
        "    with ending.kept_back() as told:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print(told(), flush=True)\n"
        "    print('not reached')\n"
        "run_script(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "True\n", "")


def test_a_check_does_not_outlive_the_script_that_asked_for_it() -> None:
    child = (
        "from common.ending import end_with_parent as e; import time; e(); print(1, flush=True); "
    )
    parent = (
        "import subprocess, sys, time\n"
        f"words = [sys.executable, '-c', {child + ' time.sleep(60)'!r}]\n"
        "child = subprocess.Popen(words, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    running = subprocess.Popen(
        [sys.executable, "-c", parent], env=env, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    place = Path("/proc") / running.stdout.readline().strip() / "cmdline"
    running.kill()
    running.wait()
    deadline = time.monotonic() + 20
    while place.exists() and place.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
