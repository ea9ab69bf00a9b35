"""Signals in the middle of imports, which make errors of their own of exceptions."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Shells let what runs in the background ignore Ctrl-C, and so do the processes it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def check_ended_by(program: str, number: int) -> None:
    """Run a program that sends itself a signal: it ends with that, and says one line at most."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    said = "interrupted\n" if number == signal.SIGINT else ""
    assert (done.returncode, done.stderr) == (128 + number, said)


# What libraries make of an exception that comes at a bad moment.
OTHERS = {
    "an error of a lock": "raise RuntimeError('cannot release un-acquired lock')",
    "one with the same name": "raise type(error)(f'in transformed code: {error}')",
    "a message": "raise SystemExit('in transformed code')",
}


@pytest.mark.parametrize("made", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_library_makes_of_a_signal_is_the_signal(made: str, number: int) -> None:
    program = (
        "import os; from common.ending import run_script\n"
        "def main():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        import time; time.sleep(9)\n"
        "    except BaseException as error:\n"
        f"        {made}\n"
        "run_script(main)\n"
    )
    check_ended_by(program, number)


# Where Python only prints an exception, and goes on.
IGNORED = {
    "at a fork": "os.register_at_fork(after_in_parent=signalled); os.fork() or os._exit(0)",
    "when an object goes": "type('Object', (), {'__del__': lambda _: signalled()})()",
    "in a reference's callback": "import weakref; kept = weakref.ref(set(), lambda _: signalled())",
}


@pytest.mark.parametrize("at", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_lost_where_python_ignores_exceptions(at: str, number: int) -> None:
    program = (
        "import os, time; from common.ending import run_script\n"
        "def signalled():\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(9)\n"
        "def main():\n"
        f"    {at}\n"
        "    time.sleep(60)\n"
        "run_script(main)\n"
    )
    check_ended_by(program, number)


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


# A thread that hears signals, as those that libraries start do, and sends one again and again.
SIGNALLED = """
import os, signal, threading
from llm import runtime
heard, done = [], threading.Event()
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
def send():
    while not done.wait(0.01):
        os.kill(os.getpid(), signal.SIGTERM)
sender = threading.Thread(target=send)
sender.start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # so it has to be the thread
runtime.prepare()
runtime.load_paddle()
done.set()
sender.join()
print(len(heard) > 20)
"""


def test_paddle_prints_no_stack_of_a_signal_during_its_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# Each writes the ids of the processes that it started, which would work for a minute.
SAY = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
CHECK = f"""
from common.ending import run_check
run_check(["-c", "from common.ending import heed_starter; heed_starter(); {SAY}"])
"""
SCRIPT = f"""
from common.ending import run_check
run_check(["-c", "from common.ending import run_script; run_script(lambda: exec('{SAY}'))"])
"""
POOL = f"""
import os
from concurrent.futures import ProcessPoolExecutor
from common.ending import work_for_parent
def work():
    {SAY}
with ProcessPoolExecutor(2, initializer=work_for_parent, initargs=(os.getpid(),)) as pool:
    pool.submit(work).result()
"""
CRASH = f"""
from data.crashes import find_crash
def work(item):
    {SAY}
find_crash(work, [1], "fork")
"""


@pytest.mark.parametrize(
    "parent", [CHECK, SCRIPT, POOL, CRASH], ids=["a check", "a script", "a pool", "a search"]
)
def test_a_child_does_not_outlive_the_process_that_started_it(parent: str) -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", parent],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    child = int(running.stdout.readline())
    assert child != running.pid
    place = Path(f"/proc/{child}/cmdline")
    assert place.read_bytes()
    running.kill()
    running.wait()
    deadline = time.monotonic() + 20
    while place.exists() and place.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


NEW = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
from common.ending import run_script
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from common.ending import starting_workers
def main():
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with starting_workers():
        result = pool.submit(print, "worked", flush=True)
    result.result()
    pool.shutdown()
if __name__ == "__main__":
    run_script(main)
else:  # the worker, before its first piece of work
    import time
    print("started", flush=True)
    time.sleep(1)
"""


def test_ctrl_c_while_workers_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(NEW)
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "started\n"
    os.killpg(running.pid, signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert (running.returncode, said) == (130, "interrupted\n")


WAITING = f"""
from common.ending import run_script
def main():
{textwrap.indent(CRASH, "    ")}
run_script(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_does_not_wait_for_workers(number: int) -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    running.stdout.readline()
    running.send_signal(number)
    said = running.communicate(timeout=30)[1]
    assert (running.returncode, said) == (
        128 + number,
        "interrupted\n" if number == signal.SIGINT else "",
    )


def test_a_script_that_no_check_started_heeds_nobody() -> None:
    program = "import os; from common import ending; ending.heed_starter(); print('goes on')"
    done = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "$0" & wait', program],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "goes on\n"


# Files that start processes, and the word by which those end with who started them.
STARTERS = {
    "common/ending.py": "_STARTED_BY",
    "convert_checkpoint.py": "run_check",
    "data/conversations/chat_encoding.py": "work_for_parent",
    "data/corpus/prepare_job.py": "Inherited.start",
    "data/crashes.py": "work_for_parent",
    "data/tokenization/batch.py": "work_for_parent",
    "demo.py": "ends when its command does",
    "llm/engine/verify.py": "run_check",
    "llm/evaluation/report.py": "git, which answers at once",
    "llm/parallel/faults.py": "a sentry outlives its rank on purpose; it ends when its pipe does",
    "llm/serving/http_process.py": "_lost: its link to the engine's process ends with that",
    "llm/serving/page/page_process.py": "until_stdin_closes",
    "paddlenlp_ext/loaders.py": "end_with_parent",
}
_STARTS = re.compile(
    r"subprocess\.(run|Popen|check_)|ProcessPoolExecutor\(|\.Process\(|os\.fork\(|\bPool\("
    r"|run_check\(|paddle\.io\.DataLoader[()]"
)


def test_whoever_starts_a_process_says_how_it_ends() -> None:
    places = [*REPO.glob("*.py")]
    for package in ("common", "data", "llm", "paddlenlp_ext"):
        places += (REPO / package).rglob("*.py")
    texts = {str(place.relative_to(REPO)): place.read_text() for place in places}
    assert {name for name, text in texts.items() if _STARTS.search(text)} == STARTERS.keys()
    for name, how in STARTERS.items():
        assert " " in how or how in texts[name], f"{name} has no {how}"
