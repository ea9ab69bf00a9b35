"""Scripts ended by SIGKILL, SIGTERM and SIGINT at random moments: what is left, and going on.

After each: no answer that was shown is lost, no file under its final name is half a file, no
process stays, nothing but a line is said; then the same command (training: told to resume) runs to
its end, with the bytes of a run that nobody disturbed, and no temporary file is left.

    python -m tests.fuzz moments --seconds 3600 [--only server batch]

A case is a script, a signal and a moment. Most are forks of a process that has paddle already;
those in `COLD` are fresh interpreters, most of whose time goes into imports.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.forked_scripts import ForkedScript
from tests.distributed.rank_server import RankServer
from tests.fuzz import Tally, budget, flag_places
from tests.fuzz.flag_cases import value_of
from tests.fuzz.flags import files_of

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STUCK_S = 60.0
# Lists that grow under their names: of steps, of lines that were left out, of stacks.
_GROWING = ("train_log.jsonl", ".bad_lines.txt", "stacks.0.txt")
_TRAIN = "--per_device_train_batch_size 2 --learning_rate 1e-2 --logging_steps 1 --do_train"
_PRETRAIN = f"--model_name_or_path {{model}} --input_dir {{store}} --max_seq_length 32 {_TRAIN}"
_ASK = "--data_file {many} --max_length 30 --batch_size 2 --ignore_eos --output_file {out}/said"


@dataclass(frozen=True)
class Target:
    """A command line whose end comes early.

    Args:
        script: a script, or a module.
        line: its words; ``{out}`` is a fresh place.
        trains: it is gone on with by ``--resume_from_checkpoint true``.
        shows: it prints answers that have to be in its output file.
        serves: it ends by signals only.
    """

    script: str
    line: str
    trains: bool = False
    shows: bool = False
    serves: bool = False


TARGETS = {
    "run_pretrain": Target(
        "run_pretrain.py",
        f"{_PRETRAIN} --max_steps 24 --save_steps 4 --output_dir {{out}}/run --split 8,1,1 "
        "--do_eval --evaluation_strategy steps --dataloader_num_workers 1",
        trains=True,
    ),
    "async pretrain": Target(
        "run_pretrain.py",
        f"{_PRETRAIN} --max_steps 24 --save_steps 3 --output_dir {{out}}/run --async_save "
        "--save_total_limit 2",
        trains=True,
    ),
    "finetune": Target(
        "finetune_generation.py",
        "--model_name_or_path {model} --dataset_path {squad} --src_length 300 --tgt_length 60 "
        f"{_TRAIN} --max_steps 10 --save_steps 2 --output_dir {{out}}/run --lora --merge_weights",
        trains=True,
    ),
    "predict": Target("predict_generation.py", f"--model_path {{model}} {_ASK}", shows=True),
    "infer": Target("infer_generation.py", f"--model_dir {{program}} {_ASK}", shows=True),
    "export": Target(
        "export_generation_model.py", "--model_path {model} --output_path {out}/x/llama"
    ),
    "evaluate": Target(
        "evaluate_generation.py",
        "--model_path {model} --task perplexity choices --data_file {text} {choices} "
        "--output_file {out}/figures.json --batch_size 1 --stride 4 --max_length 32",
    ),
    "questions": Target(
        "evaluate_generation.py",
        "--model_path {model} --task gsm8k --data_file {problems} --max_answer_tokens 60 "
        "--output_file {out}/questions.json --batch_size 1",
    ),
    "quantize": Target(
        "quantize_generation.py",
        "--model_path {model} --output_dir {out}/new --quant_type W4 --group_size 16 "
        "--calibration_file {text} --calibration_length 64",
    ),
    "merge": Target(
        "merge_lora.py", "--model_path {model} --lora_path {lora} --output_dir {out}/new"
    ),
    "convert": Target(
        "convert_checkpoint.py",
        "--input_dir {model} --output_dir {out}/new --tensor_parallel_degree 2",
    ),
    "prepare": Target(
        "data.prepare",
        "--input {long} --tokenizer {model} --output_prefix {out}/s --workers 2",
    ),
    "merge stores": Target("data.merge", "--input {store}/s {store2}/s --output_prefix {out}/s"),
    "prepare instruct": Target(
        "data.prepare",
        "--task instruct --input {squad}/train.json --tokenizer {model} --output_prefix {out}/s",
    ),
    "prepare much": Target(
        "data.prepare",
        "--task instruct --input {talks} --tokenizer {model} --output_prefix {out}/s",
    ),
    "convert_instruct": Target(
        "data.conversations.convert_instruct", "--input {records} --output {out}/new.jsonl"
    ),
    "batch": Target(
        "llm.serving.batch",
        "--model_path {model} --input_file {asked} --output_file {out}/batch.jsonl "
        "--max_num_seqs 2",
    ),
    "server": Target("server.py", "--no_ui --flask_port 0 --model_path {model}", serves=True),
}
# Fresh interpreters, and what only they have: imports, the page.
COLD = {
    name: TARGETS[name]
    for name in ("run_pretrain", "predict", "export", "convert", "prepare", "server")
} | {
    "server and page": Target(
        "server.py", "--port {port} --flask_port 0 --model_path {model}", serves=True
    ),
}


def _alive(group: int) -> list[str]:
    """Return the processes of a group that have not ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            figures = (place / "stat").read_text().rpartition(")")[2].split()
            line = (place / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(figures[2]) == group and figures[0] != "Z":
            found.append(f"{place.name} {line}")
    return found


class Cold:
    """A fresh interpreter, with the face of :class:`ForkedScript`."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        self._files = [cwd / f"cold.{name}" for name in ("stdout", "stderr")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=flag_places.REPO,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.poll = self._process.poll

    def said(self) -> list[str]:
        """Return standard output and standard error."""
        return [file.read_text(errors="replace") for file in self._files]


class Bench:
    """Starts targets and looks at what is left of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.server = RankServer({"OMP_NUM_THREADS": "1"})
        self.server.preload("paddlenlp_ext.trainer", "matplotlib.backends.backend_agg")
        self.server.preload("matplotlib.figure")
        self._numbers = itertools.count()
        self._references: dict[str, tuple[dict[str, str], float]] = {}
        (root / "places").mkdir()
        self.places = flag_places.make(
            root / "places", lambda script, words: self._fork(script, words).read()
        )
        self._more_places(root / "places")

    def _more_places(self, root: Path) -> None:
        """Write inputs that take a second or so."""
        prompts = [f"prompt {number}" for number in range(24)]
        (root / "many.jsonl").write_text("\n".join(map(json.dumps, prompts)))
        lines = [f"Line {n} says that {n * n} is a square." for n in range(60000)]
        (root / "long.txt").write_text("\n\n".join(lines))
        asked = [flag_places.asked(f"prompt {number}") for number in range(60)]
        (root / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
        record = {"instruction": "Say it.", "input": "", "output": "It is said."}
        (root / "records.jsonl").write_text((json.dumps(record) + "\n") * 8000)
        told = {**record, "output": "It is said in many words. " * 35}
        (root / "talks.jsonl").write_text((json.dumps(told) + "\n") * 7000)
        names = {
            "talks": "talks.jsonl",
            "many": "many.jsonl",
            "asked": "asked.jsonl",
            "long": "long.txt",
            "records": "records.jsonl",
        }
        self.places |= {name: str(root / file) for name, file in names.items()} | {"port": "0"}

    def _words(self, script: str) -> list[str]:
        return [str(flag_places.REPO / script)] if script.endswith(".py") else ["-m", script]

    def _fork(self, script: str, words: list[str]) -> ForkedScript:
        return ForkedScript(self.server, [*self._words(script), *words], self.root)

    def start(self, target: Target, out: Path, more: str = "", cold: bool = False) -> Any:
        """Start a target; its words are followed by others."""
        words = value_of(f"{target.line} {more}", {**self.places, "out": str(out)})
        if cold:
            return Cold([*self._words(target.script), *words], out.parent)
        return self._fork(target.script, words)

    def fresh(self) -> Path:
        """Return a new place for a target."""
        out = self.root / f"run{next(self._numbers)}" / "out"
        out.mkdir(parents=True)
        return out

    def reference(self, name: str, target: Target, cold: bool) -> tuple[dict[str, str], float]:
        """Return what an undisturbed run leaves, and how many seconds it takes."""
        key = f"{name} {cold}"
        if key not in self._references:
            out, begin = self.fresh(), time.monotonic()
            running = self.start(target, out, cold=cold)
            if target.serves:
                while "API ready" not in _said(running)[1]:
                    assert running.poll() is None and time.monotonic() < begin + 120
                    time.sleep(0.02)
                seconds = time.monotonic() - begin
                os.killpg(running.pid, signal.SIGKILL)
                while running.poll() is None:
                    time.sleep(0.01)
            else:
                while running.poll() is None:
                    assert time.monotonic() < begin + 200
                    time.sleep(0.01)
                seconds = time.monotonic() - begin
                assert running.poll() == 0, _said(running)[1][-3000:]
            self._references[key] = (_final(out), seconds)
            shutil.rmtree(out.parent)
        return self._references[key]


def _said(running: Any) -> list[str]:
    """Return standard output and standard error; a fork may not have opened either yet."""
    return [
        file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        for file in running._files
    ]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts) or ".partial" in name


def _final(out: Path) -> dict[str, str]:
    """Return what lies under final names, but for logs that grow."""
    return {
        name: content
        for name, content in files_of(out).items()
        if not _hidden(name) and not name.endswith(_GROWING)
    }


def _hidden_files(out: Path) -> list[str]:
    names = [str(path.relative_to(out)) for path in out.rglob("*")]
    return [name for name in names if _hidden(name) and ".partial" not in name]


def _statuses(target: Target, number: int) -> set[int]:
    """Return the exit statuses that are right where a signal came in time."""
    if number == signal.SIGKILL:
        return {-number}
    right = {-number, 128 + number}
    if target.serves:
        right.add(0)
    if target.trains and number == signal.SIGTERM:
        right.add(2)  # "stopped by SIGTERM after step N, with a checkpoint"
    return right


def _quiet(said: str) -> bool:
    """Whether no stack was printed, but by Python itself before a line of ours ran."""
    if any(word in said for word in ("FatalError", "paddle::", "C++ Traceback")):
        return False
    return "Traceback" not in said or str(flag_places.REPO) not in said


def _lost(shown: str, out: Path) -> str | None:
    """Return what is wrong where answers were shown that are in no file."""
    blocks = shown.split("\n\n")[:-1]
    rows = []
    for file in (out / "said", out / "said.partial"):
        if file.exists():
            whole = file.read_text().rpartition("\n")[0]
            rows += [json.loads(line)["prompt"] for line in whole.splitlines()]
    lost = [block for block in blocks if block[2:].split("\n")[0] not in rows]
    return f"shown and lost: {lost}" if lost else None


def _disturb(bench: Bench, target: Target, running: Any, out: Path, number: int) -> list[str]:
    """Send a signal; return what is wrong with the end."""
    wrong: list[str] = []
    send = os.killpg if number == signal.SIGINT else os.kill  # Ctrl-C is heard by all
    ended_before = running.poll() is not None
    if not ended_before:
        send(running.pid, number)
    end = time.monotonic() + STUCK_S
    while running.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if running.poll() is None:
        wrong.append(f"stuck: {_alive(running.pid)}")
        os.killpg(running.pid, signal.SIGKILL)
        while running.poll() is None:
            time.sleep(0.01)
    while (left := _alive(running.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        wrong.append(f"processes stay: {left}")
        os.killpg(running.pid, signal.SIGKILL)
    shown, said = _said(running)
    if running.poll() not in _statuses(target, number) | {0}:
        wrong.append(f"status {running.poll()}: {said[-1500:]}")
    if not _quiet(said):
        wrong.append(f"said: {said[-2500:]}")
    if target.shows and (lost := _lost(shown, out)):
        wrong.append(lost)
    return wrong


def _half(bench: Bench, whole: dict[str, str], out: Path) -> list[str]:
    """Return files under final names that are not those of an undisturbed run."""
    wrong = []
    for name, content in _final(out).items():
        resolved = whole.get(name)
        if resolved is None and re.search(r"checkpoint-\d+/|-progress/", name):
            continue  # what the run would have deleted later, or was told to write
        if resolved != content:
            wrong.append(f"{name} is not that of an undisturbed run")
    return wrong


def _again(bench: Bench, target: Target, out: Path, whole: dict[str, str]) -> list[str]:
    """Run the same command to its end; return what is wrong."""
    more = ""
    if target.trains and (out / "run").is_dir():
        complete = list((out / "run").glob("checkpoint-*/complete.json"))
        more = "--resume_from_checkpoint true" if complete else "--overwrite_output_dir true"
    if target.script in ("data.prepare", "data.merge") and _final(out):
        more = "" if (out / ".s.journal").exists() else "--overwrite"
    if (out / "new").is_dir():
        return []  # it was through
    running = bench.start(target, out, more)
    end = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if running.poll() != 0:
        return [f"run again with {more!r}: {running.poll()} {_said(running)[1][-1500:]}"]
    wrong = []
    found = _final(out)
    for name in whole.keys() | found.keys():
        if found.get(name) != whole.get(name) and "checkpoint-" not in name:
            wrong.append(f"run again with {more!r}: {name} is another")
    if hidden := _hidden_files(out):
        wrong.append(f"run again with {more!r}: {hidden} stay")
    return wrong


def try_moment(bench: Bench, name: str, number: int, share: float, cold: bool) -> list[str]:
    """End a target early; return what is wrong.

    Args:
        bench: starts it.
        name: of the target.
        number: the signal.
        share: the moment, as a share of the time that it takes.
        cold: in a fresh interpreter.
    """
    target = (COLD if cold else TARGETS)[name]
    whole, seconds = bench.reference(name, target, cold)
    out = bench.fresh()
    begin = time.monotonic()
    running = bench.start(target, out, cold=cold)
    time.sleep(max(0.0, begin + share * seconds * (1.3 if target.serves else 1) - time.monotonic()))
    wrong = _disturb(bench, target, running, out, number)
    if not target.serves:
        wrong += _half(bench, whole, out)
        if not wrong and not cold:
            wrong += _again(bench, target, out, whole)
    if not wrong:
        shutil.rmtree(out.parent)
    return wrong


def main(argv: Sequence[str]) -> int:
    """Try moments within a budget."""
    plan = budget(argv, __doc__ or "", sorted(TARGETS | COLD))
    tally = Tally("moments")
    # Shells let what runs in the background ignore it, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kinds = [(name, False) for name in TARGETS] + [(name, True) for name in COLD]
    kinds = [kind for kind in kinds if not plan.only or kind[0] in plan.only]
    with tempfile.TemporaryDirectory(prefix="moments-") as place:
        bench = Bench(Path(place))
        try:
            for seed in plan.seeds():
                draw = random.Random(seed)
                name, cold = kinds[seed % len(kinds)]
                number = SIGNALS[seed // len(kinds) % len(SIGNALS)]
                share = draw.random()
                wrong = try_moment(bench, name, number, share, cold)
                what = f"{name}{' (fresh)' if cold else ''} {signal.Signals(number).name}"
                if wrong:
                    print(f"! --seed {seed}: {what} at {share:.2f}: {'; '.join(wrong)}", flush=True)
                    tally.differ(seed, f"{what} at {share:.2f}: {wrong[0][:300]}")
                else:
                    print(f"  --seed {seed}: {what} at {share:.2f}", flush=True)
                    tally.count(what)
        finally:
            bench.server.close()
    return tally.report()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
