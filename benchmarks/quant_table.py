"""What rounding costs a trained model: perplexity and bytes, form by form.

`make quant-table` runs it. Every form is made in a directory of its own, which a later run finds
again, and measured by evaluate_generation.py: what quantize_generation.py writes, what llama.cpp's
quantizer makes of the same weights (quant_gguf.py), and four bits with zero points as a reference
computes them (quant_zero_points.py). Without --text, the standard library's documentation strings
are measured on, those of every second module; without --calibration_file, the others are what
calibrates, so no form has seen the text that it is measured on.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
from quant_gguf import DESCRIPTION
from record import ROOT

sys.path.insert(0, str(ROOT))

from llm.evaluation.text_files import documentation, library_modules

_WIDE = ("--wide_share", "0.2")
_TEXT = "--calibration_file"  # the last word of forms that look at text
_W8, _W4 = ("--quant_type", "W8"), ("--quant_type", "W4")
_A8W8, _A8W4 = ("--quant_type", "A8W8"), ("--quant_type", "A8W4")
_32, _64 = ("--group_size", "32"), ("--group_size", "64")
# Made by quantize_generation.py with these flags.
FORMS: dict[str, tuple[str, ...]] = {
    "W8": _W8,
    "W8, scaled": (*_W8, _TEXT),
    "A8W8, to the nearest": _A8W8,
    "A8W8": (*_A8W8, _TEXT),
    "W4, to the nearest, groups of 64": (*_W4, *_64, "--method", "rtn"),
    "W4, to the nearest, groups of 32": (*_W4, *_32, "--method", "rtn"),
    "W4, groups of 64": (*_W4, *_64, _TEXT),
    "W4, groups of 32": (*_W4, *_32, _TEXT),
    "W4, groups of 32, not scaled": (*_W4, *_32, "--scaling", "none", _TEXT),
    "W4, groups of 64, a fifth in 8 bits": (*_W4, *_64, *_WIDE, _TEXT),
    "W4, groups of 32, a fifth in 8 bits": (*_W4, *_32, *_WIDE, _TEXT),
    "A8W4, groups of 64, a fifth in 8 bits": (*_A8W4, *_64, *_WIDE, _TEXT),
    "A8W4, groups of 32, a fifth in 8 bits": (*_A8W4, *_32, *_WIDE, _TEXT),
}
# Made by quant_zero_points.py; a reference, which no product of the suite computes with.
ZERO_POINTS: dict[str, tuple[str, ...]] = {
    "zero points, groups of 64": (*_64, _TEXT),
    "zero points, groups of 32": (*_32, _TEXT),
}
# Made by llama.cpp's quantizer.
PEERS = {"llama.cpp's Q4_0": "Q4_0", "llama.cpp's Q4_K_M": "Q4_K_M"}
PLAIN = "as it is"


def strings(odd: bool) -> Iterator[str]:
    """Yield documentation strings of every second module of the standard library."""
    return documentation(library_modules()[int(odd) :: 2])


def read_text(file: Path) -> str:
    """Return a file's text, of JSON lines their ``text``."""
    whole = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return whole
    return "\n\n".join(json.loads(line)["text"] for line in whole.split("\n") if line)


def write_texts(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return files of what calibrates and what is measured on, written where not given."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    calibration = args.calibration_file
    if calibration is None:
        calibration = args.output_dir / "calibration.txt"
        calibration.write_text("\n\n".join(strings(odd=True)), encoding="utf-8")
    measured = args.output_dir / "measured.txt"
    whole = read_text(args.text) if args.text else "\n\n".join(strings(odd=False))
    measured.write_text(whole[: args.characters], encoding="utf-8")
    return calibration, measured


def run(*words: str | Path) -> float:
    """Run a command of this checkout, its lines on stderr; return its largest memory in MB."""
    child = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=sys.stderr)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"error: `{' '.join(map(str, words))}` ended with {child.returncode}")
    return used.ru_maxrss * 1024 / 1e6


class Table:
    """Forms of one model, each made and measured once.

    Args:
        args: the command's.
        texts: what calibrates and what is measured on.
        settings: what all figures depend on; each set of them has a directory of its own.
    """

    def __init__(
        self, args: argparse.Namespace, texts: tuple[Path, Path], settings: dict[str, Any]
    ) -> None:
        self.args = args
        self.calibration, self.measured = texts
        digest = hashlib.sha256(json.dumps([str(args.model), settings]).encode()).hexdigest()
        self.place = args.output_dir / digest[:12]
        self.place.mkdir(exist_ok=True)
        config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
        self.window = min(512, config["max_position_embeddings"])

    def row(self, form: str) -> tuple[dict[str, Any], bool]:
        """Return the figures of a form, and whether they are new: an earlier run's are kept."""
        place = self.place / "-".join(re.findall(r"[a-z0-9]+", form.lower()))
        kept = place.with_name(place.name + ".json")
        new = not kept.exists()
        if new:
            row = {"linear_bytes": None} if form == PLAIN else self._make(form, place)
            model = self.args.model if form == PLAIN else place
            row["perplexity"] = self._measure(model, place.with_name(place.name + "-scores.json"))
            kept.write_text(json.dumps(row), encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
        return json.loads(kept.read_text(encoding="utf-8")), new

    def _make(self, form: str, place: Path) -> dict[str, Any]:
        if form in PEERS:
            if not place.exists():
                words = ("benchmarks/quant_gguf.py", self.args.model, PEERS[form], place)
                run(self.args.peers_python, *words)
            made: dict[str, Any] = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
            return made
        if form in ZERO_POINTS:
            if not place.exists():
                words = ("benchmarks/quant_zero_points.py", self.args.model, place)
                run(sys.executable, *words, *self._flags(ZERO_POINTS[form]))
            made = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
            return made
        peak = None
        if not place.exists():
            words = ("quantize_generation.py", "--model_name_or_path", self.args.model)
            flags = ("--output_dir", place, *self._flags(FORMS[form]))
            peak = round(run(sys.executable, *words, *flags))
        report = json.loads((place / "quantization_report.json").read_text(encoding="utf-8"))
        types = {"W8": len(report["wide"])} if report["wide"] else {}
        types[report["quant_type"]] = report["linears"] - len(report["wide"])
        return {
            "linear_bytes": report["linear_bytes"]["after"],
            "types": types,
            "seconds": report["seconds"],
            "peak_mb": peak,
        }

    def _flags(self, form: tuple[str, ...]) -> tuple[str | Path, ...]:
        if form[-1] != _TEXT:
            return form
        rows = ("--calibration_samples", str(self.args.samples))
        return (*form, self.calibration, *rows, "--calibration_length", str(self.args.length))

    def _measure(self, model: Path, scores: Path) -> float:
        window = str(self.window)
        run(
            *(sys.executable, "evaluate_generation.py", "--model_name_or_path", model),
            *("--task", "perplexity", "--data_file", self.measured, "--max_length", window),
            *("--stride", window, "--packed_cache", "off", "--output_file", scores),
        )
        (result,) = json.loads(scores.read_text(encoding="utf-8"))["results"]
        return float(result["figures"]["token_perplexity"])


def main(args: argparse.Namespace) -> None:
    """Print the table line by line, and store the rows."""
    texts = write_texts(args)
    name = args.text.name if args.text else "documentation strings of the standard library"
    calibration = args.calibration_file.name if args.calibration_file else "the other such strings"
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in texts]
    settings = {
        "model": args.name or args.model.name,
        "text": name,
        "characters": args.characters,
        "text_sha256": digests[1],
        "calibration": calibration,
        "calibration_sha256": digests[0],
        "samples": args.samples,
        "length": args.length,
    }
    print(f"{settings['model']}: perplexity on {name}, first {args.characters} characters", end=" ")
    print(f"({digests[1][:12]}), calibrated on {calibration} ({digests[0][:12]}),", end=" ")
    print(f"{args.samples} rows of {args.length}")
    print(f"{'form':40}{'linears, MB':>12}{'perplexity':>12}{'change':>9}{'seconds':>9}  types")
    table, before = Table(args, texts, settings), 0.0
    for form in (PLAIN, *(args.forms or (*FORMS, *ZERO_POINTS, *PEERS))):
        row, new = table.row(form)
        before = before or row["perplexity"]
        change = 100 * (row["perplexity"] / before - 1)
        size = f"{row['linear_bytes'] / 1e6:12.1f}" if row["linear_bytes"] else f"{'':12}"
        took = f"{row['seconds']:9.0f}" if "seconds" in row else f"{'':9}"
        types = ", ".join(f"{count} {kind}" for kind, count in row.get("types", {}).items())
        print(f"{form:40}{size}{row['perplexity']:12.3f}{change:+8.2f}%{took}  {types}", flush=True)
        if new:
            load = {"load": os.getloadavg()[0]}
            described = {"form": form, **row, "change": round(change, 3), **settings, **load}
            record.write_row("quantization", described | record.environment())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "outputs/real-model-off-grid")
    parser.add_argument("--name", help="of the model in the table; that of its directory")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs/quant-table")
    parser.add_argument("--text", type=Path, help="measured on instead of the standard library's")
    parser.add_argument("--calibration_file", type=Path, help="likewise, to calibrate on")
    parser.add_argument("--characters", type=int, default=14_000, help="of --text")
    parser.add_argument("--samples", type=int, default=128, help="rows of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--forms", nargs="*", help="some of them only")
    parser.add_argument("--peers_python", type=Path, default=ROOT / ".venv-peers/bin/python")
    main(parser.parse_args())
