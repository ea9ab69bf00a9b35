"""Results as they come: what lies where at each moment, and how a script ends."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import files
from common.errors import DataError, UserError
from common.files import check_directory
from common.results import Journal

REPO = Path(__file__).resolve().parents[3]


def values(path: Path) -> list[object]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_is_whole_at_the_end_and_partial_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    path.parent.mkdir()
    path.write_text('"old"\n')
    with Journal(path) as journal:
        for number in (2, 0, 1):
            journal.add(number, number)
            assert values(path) == ["old"]
        assert journal.place == path.with_name("out.jsonl.partial")
        assert values(journal.place) == [2, 0, 1]
        journal.finish()
    assert values(path) == [0, 1, 2]
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


def test_an_early_end_leaves_the_partial_file_and_the_next_run_another(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for name in ("out.jsonl.partial", "out.jsonl.partial2"):
        with pytest.raises(KeyboardInterrupt), Journal(path) as journal:
            journal.add(0, name)
            raise KeyboardInterrupt
        assert not path.exists() and values(tmp_path / name) == [name]
    with pytest.raises(KeyboardInterrupt), Journal(path):
        raise KeyboardInterrupt
    assert not (tmp_path / "out.jsonl.partial3").exists(), "nothing came"


@pytest.mark.parametrize("stops", [False, True])
def test_a_pipe_gets_lines_in_order_and_late_ones_at_an_early_end(
    stops: bool, tmp_path: Path
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.extend(path.read_text().splitlines()))
    reader.start()
    with pytest.raises(SystemExit), Journal(path) as journal:
        for number in (1, 3, 0):
            journal.add(number, number)
        if not stops:
            journal.add(2, 2)
            journal.finish()
        raise SystemExit
    reader.join(5)
    assert got == (["0", "1", "3"] if stops else ["0", "1", "2", "3"])


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    with Journal("/dev/full") as journal, pytest.raises(DataError, match="no space is left"):
        journal.add(0, "x" * 100_000)


BELOW = [("file/x/y", "is a file; give a directory"), ("full", "is not empty; give a new")]


@pytest.mark.parametrize(("name", "message"), BELOW)
def test_a_directory_that_cannot_be_made(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match=message):
        check_directory(tmp_path / name, "output_dir", "the result")
    check_directory(tmp_path / "full", "output_dir")
    check_directory(tmp_path / "new" / "below", "output_dir", "the result")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_what_another_process_tries_a_directory_with_is_no_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of one run check their common directory at once."""
    monkeypatch.setattr(Path, "rmdir", lambda _self: None)
    check_directory(tmp_path, "output_dir")
    assert list(tmp_path.iterdir()), "nothing was tried, so the test shows nothing"
    assert not files.holds_something(tmp_path)
    check_directory(tmp_path, "output_dir", "the result")


def test_a_place_that_takes_no_directories() -> None:
    with pytest.raises(UserError, match=r"output_dir=/proc/x: /proc is not writable \("):
        check_directory("/proc/x", "output_dir")


NEEDED = {
    "run_pretrain.py": "--model_name_or_path llama-3.2-1b --do_train --max_steps 1 --output_dir",
    "finetune_generation.py": "--model_name_or_path m --dataset_path d --do_train --output_dir",
    "quantize_generation.py": "--model_name_or_path m --output_dir",
    "merge_lora.py": "--model_name_or_path m --lora_path l --output_dir",
    "convert_checkpoint.py": "--input_dir m --output_dir",
    "export_generation_model.py": "--model_name_or_path m --output_path",
}


@pytest.mark.parametrize("script", NEEDED)
def test_an_output_directory_is_refused_before_paddle(script: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "paddle.py").write_text("raise SystemExit('paddle was imported')\n")
    words = [*NEEDED[script].split(), str(tmp_path / "file" / "out" / "name")]
    done = subprocess.run(
        [sys.executable, str(REPO / script), *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "fake")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "is a file; give a directory" in done.stderr and done.stderr.count("\n") == 1


PROGRAM = """
import sys, time
from common.ending import run_script
def main():
    try:
        print("\\U0001f600 begun", flush=True)
        {work}
    finally:
        sys.stderr.write("concluded\\n")
run_script(main)
"""


def program(work: str, **changes: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(REPO), **changes}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(work=work)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_concludes_what_was_begun(name: str) -> None:
    running = program("time.sleep(60)")
    assert running.stdout is not None
    assert "begun" in running.stdout.readline()
    number = getattr(signal, name)
    running.send_signal(number)
    _, said = running.communicate(timeout=20)
    line = "interrupted\n" if name == "SIGINT" else ""
    assert (running.returncode, said) == (128 + number, "concluded\n" + line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
def test_a_terminal_of_any_encoding(encoding: str) -> None:
    running = program("pass", PYTHONIOENCODING=encoding)
    assert running.communicate(timeout=20)[1] == "concluded\n" and running.returncode == 0


def test_nobody_reads() -> None:
    running = program("[print('x' * 99, flush=True) for _ in range(99999)]")
    assert running.stdout is not None and running.stderr is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.read() == "concluded\n"
    assert running.wait(20) == 141


@pytest.mark.parametrize("line", ["{", '"a', "\\udc80", '{"a": 1, "a": 2}'])
def test_what_is_no_result_is_named_with_a_cure(line: str, tmp_path: Path) -> None:
    place = tmp_path / "out.json.partial"
    place.write_text(f"1\n{line}\n", "utf-8")
    said = r"out\.json\.partial:2: .*; it is no result: remove the file to begin again, or give an"
    with pytest.raises(DataError, match=said):
        Journal(tmp_path / "out.json", lambda _, value: int(str(value)))
    assert place.read_text("utf-8") == f"1\n{line}\n"
