"""Every flag of every script, in every mode: another value changes the outcome, or is refused.

The outcome is what a user would look at: status, answers, losses, the bytes of files, HTTP answers.
A flag that changes speed or logging only stands in a table with its reason, `flag_cases.SPEED`;
one that counts where no mode leads to names the test that holds it, in `HELD`. What is neither is
reported as silent. A refusal has to name the flag.

    python -m tests.fuzz flags --seconds 1200 [--only server.py llm.serving.batch]
"""

import contextlib
import hashlib
import itertools
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from common.errors import UserError
from common.flags import load
from tests.distributed.forked_scripts import ForkedScript
from tests.distributed.rank_server import RankServer, free_port
from tests.fuzz import Tally, budget, flag_places
from tests.fuzz.flag_cases import (
    CASES,
    GROUPS,
    MAY_STAY,
    UNTRIED,
    flags_of,
    merged,
    value_of,
)
from tests.fuzz.flag_modes import MODES

# Of runs: settings, the state of clocks and generators, pictures.
_PASSED_OVER = re.compile(
    r"(run_config\.yaml|complete\.json|.*_state\.json|.*\.png|quantization_report\.json)$"
)
_CLOCKS = re.compile(r"seconds|per_second|mfu|peak_memory")
# Whose standard output is what they were asked for.
_SPEAK = ("predict", "infer", "evaluate", "quantize", "convert_checkpoint", "llm.planner")
_AT_ONCE = 2
_TURN = threading.Lock()
_DURATION = re.compile(r"\d+(\.\d+)? (s|tokens/s|MB/s)\b")


@dataclass(frozen=True)
class Cell:
    """A flag of a script in one of its modes."""

    script: str
    mode: str
    flag: str


def words_of(cell: Cell) -> tuple[list[str], list[str]]:
    """Return the words without the flag's other value, and with it."""
    case = CASES[cell.script][cell.flag]
    line = MODES[cell.script][cell.mode]
    base = merged(line, case.beside)
    if case.beside and _refusal(cell.script, base, _Anywhere()) is not None:
        base = merged(line, "")  # what would stand beside it has no place in this mode
    other = merged(" ".join(base), f"--{cell.flag} {case.of(cell.mode)}")
    if other == base and case.value == "true":  # what the mode is
        other = merged(" ".join(base), f"--{cell.flag} false")
    return base, other


def cells() -> list[Cell]:
    """Return all there are: what the loader refuses, each flag in one mode, then the others."""
    first, others = [], []
    for script, modes in MODES.items():
        for flag in sorted(flags_of(script) - UNTRIED):
            found = [Cell(script, mode, flag) for mode in modes]
            taken = [one for one in found if refused(one, _Anywhere()) is None] or found
            first.append(taken[0])
            others += [one for one in found if one != taken[0]]
    draw = random.Random(0)
    draw.shuffle(first)
    draw.shuffle(others)
    return sorted(first + others, key=lambda cell: refused(cell, _Anywhere()) is None)


class _Anywhere(dict[str, str]):
    """Places for those who only read flags."""

    def __missing__(self, name: str) -> str:
        return f"/{name}"


def refused(cell: Cell, places: dict[str, str]) -> str | None:
    """Return what the loader alone says against a flag's other value."""
    return _refusal(cell.script, words_of(cell)[1], places)


def _refusal(script: str, words: list[str], places: dict[str, str]) -> str | None:
    if script == "llm.planner":  # it reads recipes of others too
        return None
    try:
        load(GROUPS[script], [w for word in words for w in value_of(word, places)], prog=script)
    except UserError as error:
        return str(error)
    return None


def _without_clocks(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if not _CLOCKS.search(name)}


def _answered(row: dict[str, Any]) -> dict[str, Any]:
    """Return a batch file's answer without what is drawn anew each time."""
    body = {name: value for name, value in row["response"]["body"].items() if name not in _CHANCE}
    return {"custom_id": row["custom_id"], "body": body}


def _content(file: Path) -> str:
    """Return what a file says to a user, without clocks."""
    if file.name == "train_log.jsonl":
        lines = file.read_text().splitlines()
        return json.dumps([_without_clocks(json.loads(line)) for line in lines])
    if file.name.startswith("batch"):
        return json.dumps([_answered(json.loads(line)) for line in file.read_text().splitlines()])
    if file.name.endswith("_results.json"):
        return json.dumps(_without_clocks(json.loads(file.read_text())))
    if file.name == "questions.json":
        results = json.loads(file.read_text())["results"]
        return json.dumps([result["settings"]["answer"] for result in results])
    if file.name.endswith("figures.json"):
        return "there"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def files_of(out: Path) -> dict[str, str]:
    """Return the files below a directory by name, with what they say."""
    found = {}
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if "vdlrecords" in name or "events.out" in name:  # their names are times
            found[str(Path(name).parent)] = "events"
        elif file.is_file() and not _PASSED_OVER.match(file.name):
            found[name] = _content(file)
    return found


class Bench:
    """Runs command lines as forks of a process that has paddle already.

    Args:
        root: a directory for everything.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.server = RankServer({"OMP_NUM_THREADS": "1"})
        self.server.preload("paddlenlp_ext.trainer", "matplotlib.figure")
        self._numbers = itertools.count()
        self._known: dict[tuple[str, ...], Any] = {}
        self._looked_at: defaultdict[tuple[str, ...], threading.Lock] = defaultdict(threading.Lock)
        (root / "places").mkdir()
        self.places = flag_places.make(root / "places", self._run)
        self.places["port"] = str(free_port())

    def _start(self, script: str, words: list[str]) -> ForkedScript:
        head = [str(flag_places.REPO / script)] if script.endswith(".py") else ["-m", script]
        return ForkedScript(self.server, [*head, *words], self.root)

    def _run(self, script: str, words: list[str]) -> CompletedProcess[str]:
        return self._start(script, words).read()

    def outcome(self, script: str, words: Sequence[str]) -> tuple[int, str, Any]:
        """Run words, in which ``{out}`` is a fresh place: status, what was said, what came out."""
        out = self.root / f"out{next(self._numbers)}"
        out.mkdir()
        line = [word for text in words for word in value_of(text, {**self.places, "out": str(out)})]
        try:
            if script == "server.py":
                return self._ask(line)
            done = self._run(script, line)
            said = ""
            if script.startswith(_SPEAK):
                said = _DURATION.sub("", done.stdout.replace(str(out), "OUT"))
            return done.returncode, done.stderr + done.stdout, (said, files_of(out))
        finally:
            shutil.rmtree(out)

    def _ask(self, words: list[str]) -> tuple[int, str, Any]:
        """Start a server, ask it things, end it."""
        running = self._start("server.py", words)
        log, end = running._files[1], time.monotonic() + 60
        while time.monotonic() < end and running.poll() is None:
            text = log.read_text() if log.exists() else ""
            ready = re.search(r"API ready: (http://(\S+):(\d+))/v1", text)
            if ready:
                break
            time.sleep(0.05)
        else:
            done = running.read()
            return done.returncode, done.stderr, None
        fixed = ready[3] if "--flask_port 0" not in " ".join(words) else None
        answers = [ready[2], fixed, *(_request(ready[1], *asked) for asked in _ASKED)]
        running.send_signal(signal.SIGTERM)
        done = running.read()
        return done.returncode, done.stderr, answers

    def base(self, script: str, words: Sequence[str]) -> tuple[int, str, Any]:
        """Return the outcome without the flag; the first time it is looked at twice."""
        key = (script, *words)
        with self._looked_at[key]:
            if key not in self._known:
                again = first = self.outcome(script, words)
                if " ".join(words) in (" ".join(merged(m, "")) for m in MODES[script].values()):
                    again = self.outcome(script, words)
                if first[0] == 0 and first[2] != again[2]:
                    first = (1, f"twice is not the same: {first[2]} {again[2]}", None)
                self._known[key] = first
        return self._known[key]


_ASKED = (
    ("/v1/models", None),
    ("/v1/completions", {"prompt": "Hello there, world", "max_tokens": 6, "temperature": 0}),
    ("/v1/completions", {"prompt": "Hello", "temperature": 0, "logprobs": 0}),
    ("/v1/completions", {"prompt": "Hi", "user": "x" * 2000, "temperature": 0}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0},
    ),
)
_CHANCE = {"id", "created", "request_id"}


def _request(url: str, path: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    with contextlib.suppress(KeyError, IndexError, TypeError):
        content["data"][0].pop("created")
    return {name: value for name, value in content.items() if name not in _CHANCE}


def try_cell(bench: Bench, cell: Cell) -> str:
    """Return what becomes of a flag: ``different``, ``refused``, ``said``, or what is wrong."""
    beside, words = words_of(cell)
    places = {**bench.places, "out": "OUT"}
    refusal, status, said, found = refused(cell, places), 0, "", None
    if refusal is None:
        status, said, found = bench.outcome(cell.script, words)
        if status:
            refusal = said if status == 2 else f"status {status}: {said[-600:]}"
    if refusal is not None:
        values = value_of(CASES[cell.script][cell.flag].of(cell.mode), {**places, "out": ""})
        names = cell.flag in refusal or any(value in refusal for value in values if len(value) > 2)
        says = CASES[cell.script][cell.flag].says
        names = names or bool(says and re.search(says, refusal))
        return "refused" if names and "Traceback" not in refusal else f"refused badly: {refusal}"
    base = bench.base(cell.script, beside)
    if base[0] == 2 and cell.flag in base[1]:
        return "different"  # the default refuses
    if base[0] != 0:
        return f"the mode does not run: {' '.join(beside)}: {base[1][-600:]}"
    if base[2] != found:
        return "different"
    if (cell.flag, cell.mode) in MAY_STAY:
        return "may stay"
    return "said" if _named(cell.flag, said) and not _named(cell.flag, base[1]) else "SILENT"


def _named(flag: str, text: str) -> bool:
    """Whether a text names a flag, and not only a longer word such as ``avx512_bf16``."""
    return re.search(rf"(?<!\w){flag}(?!\w)", text) is not None


def _work(bench: Bench, cells_left: Iterator[tuple[int, Cell]], tally: Tally) -> None:
    """Try cells until none is left; several threads do, each of which waits for its own script."""
    while True:
        with _TURN:
            number, cell = next(cells_left, (None, None))
        if number is None or cell is None:
            return
        result = try_cell(bench, cell)
        with _TURN:
            print(f"{number} {cell.script} ({cell.mode}) --{cell.flag}: {result}", flush=True)
            if result in ("different", "refused", "said", "may stay"):
                tally.count(result)
            else:
                tally.differ(number, f"{cell.script} ({cell.mode}) --{cell.flag}: {result}")


def main(argv: Sequence[str]) -> int:
    """Try cells within a budget."""
    plan, tally = budget(argv, __doc__ or "", list(MODES)), Tally("flags")
    everything = [one for one in cells() if not plan.only or one.script in plan.only]
    with tempfile.TemporaryDirectory(prefix="flags-") as name:
        bench = Bench(Path(name))
        try:
            numbered = zip(plan.seeds(), everything[plan.seed :], strict=False)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for done in [pool.submit(_work, bench, numbered, tally) for _ in range(_AT_ONCE)]:
                    done.result()
        finally:
            bench.server.close()
    print(f"flags: {tally.counts.total()} of {len(everything)} flags in modes")
    return tally.report()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
