"""What rounding costs a trained model: perplexity and bytes, form by form.

`make quant-table` runs it. Every form is a run of quantize_generation.py; llama.cpp's Q4_0 is what
its own package gguf makes of the same linears, widened again, in the peers' environment. Without
--text, the standard library's documentation strings are measured on, those of every second module;
the others are always what calibrates, so no form has seen the text that it is measured on.
"""

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_FINE = ("--group_size", "32", "--wide_share", "0.2")
FORMS: dict[str, tuple[str, ...]] = {
    "W8": ("--quant_type", "W8"),
    "A8W8, to the nearest": ("--quant_type", "A8W8"),
    "A8W8": ("--quant_type", "A8W8", "--calibration_file"),
    "W4, to the nearest": ("--quant_type", "W4", "--method", "rtn"),
    "W4, not scaled": ("--quant_type", "W4", "--scaling", "none", "--calibration_file"),
    "W4": ("--quant_type", "W4", "--calibration_file"),
    "W4, a fifth of 8 bits": (*_FINE, "--quant_type", "W4", "--calibration_file"),
    "A8W4, a fifth of 8 bits": (*_FINE, "--quant_type", "A8W4", "--calibration_file"),
}
PEER = "llama.cpp's Q4_0"
_LEAST = 80  # characters of a documentation string worth reading


def strings(odd: bool) -> Iterator[str]:
    """Yield documentation strings of every second module of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for file in files[int(odd) :: 2]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found = ast.get_docstring(node)
                if found and len(found) > _LEAST:
                    yield found


def write_texts(place: Path, text: Path | None, characters: int) -> tuple[Path, Path]:
    """Write what calibrates and what is measured on; return both files."""
    place.mkdir(parents=True, exist_ok=True)
    calibration, measured = place / "calibration.txt", place / "measured.txt"
    calibration.write_text("\n\n".join(strings(odd=True)), encoding="utf-8")
    whole = text.read_text(encoding="utf-8") if text else "\n\n".join(strings(odd=False))
    measured.write_text(whole[:characters], encoding="utf-8")
    return calibration, measured


def round_with_gguf(source: Path, target: Path) -> None:
    """Write a model with its linears rounded to Q4_0 and widened again (in the peers' Python)."""
    import gguf
    from safetensors.numpy import load_file, save_file

    tensors, kind = load_file(source / "model.safetensors"), gguf.GGMLQuantizationType.Q4_0
    size = 0
    for name, tensor in tensors.items():
        if "_proj." in name:
            rounded = gguf.quants.quantize(tensor, kind)
            size += rounded.nbytes
            tensors[name] = gguf.quants.dequantize(rounded, kind).astype("float32")
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            (target / file.name).write_bytes(file.read_bytes())
    (target / "linear_bytes.txt").write_text(str(size), encoding="utf-8")


def run(*words: str | Path) -> None:
    """Run a command of this checkout, its lines on stderr."""
    subprocess.run(list(map(str, words)), cwd=ROOT, check=True, stdout=sys.stderr)


def measure(args: argparse.Namespace, name: str, texts: tuple[Path, Path]) -> dict[str, Any]:
    """Quantize and measure; what is there from an earlier run is measured no more."""
    place = args.output_dir / "".join(c if c.isalnum() else "-" for c in name.lower())
    calibration, measured = texts
    report = place / "quantization_report.json"
    if not report.exists():
        words: list[str | Path] = [*FORMS[name]]
        if words[-1] == "--calibration_file":
            words += [calibration, "--calibration_samples", str(args.samples)]
        run(
            *(sys.executable, "quantize_generation.py", "--model_name_or_path", args.model),
            *("--output_dir", place, *words, "--eval_file", measured),
        )
    figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return {
        "linear_bytes": figures["linear_bytes"]["after"],
        "before": figures["perplexity"]["before"],
        "perplexity": figures["perplexity"]["after"],
        "seconds": figures["seconds"],
        "wide": len(figures["wide"]),
    }


def measure_peer(args: argparse.Namespace, measured: Path) -> dict[str, Any]:
    """Measure the same weights rounded by gguf."""
    place = args.output_dir / "gguf-q4-0"
    if not place.exists():
        run(args.peers_python, __file__, "--round", args.model, place)
    scores = args.output_dir / "gguf-q4-0.json"
    run(
        *(sys.executable, "evaluate_generation.py", "--model_name_or_path", place),
        *("--task", "perplexity", "--data_file", measured, "--max_length", "512"),
        *("--stride", "512", "--output_file", scores),
    )
    figures = json.loads(scores.read_text(encoding="utf-8"))
    (perplexity,) = _values(figures, "token_perplexity")
    size = int((place / "linear_bytes.txt").read_text(encoding="utf-8"))
    return {"linear_bytes": size, "perplexity": perplexity}


def _values(tree: Any, key: str) -> Iterator[Any]:
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        for value in tree.values():
            yield from _values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, key)


def main(args: argparse.Namespace) -> None:
    """Print the table line by line, and store the rows."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import record

    texts = write_texts(args.output_dir, args.text, args.characters)
    name = args.text.name if args.text else "documentation strings of the standard library"
    digest = hashlib.sha256(texts[1].read_bytes()).hexdigest()
    common = {
        "model": args.model.name,
        "text": name,
        "characters": args.characters,
        "text_sha256": digest,
        "calibration_sha256": hashlib.sha256(texts[0].read_bytes()).hexdigest(),
        "samples": args.samples,
        "load": os.getloadavg()[0],
        **record.environment(),
    }
    print(f"{args.model.name}, {name}, first {args.characters} characters, sha256 {digest[:12]}")
    print(f"{'form':26}{'linears, MB':>12}{'perplexity':>12}{'change':>10}{'seconds':>9}")
    before = None
    for form in args.forms or (*FORMS, PEER):
        row = measure_peer(args, texts[1]) if form == PEER else measure(args, form, texts)
        before = row.get("before", before)
        change = f"{100 * (row['perplexity'] / before - 1):+9.2f}%" if before else f"{'':10}"
        took = f"{row['seconds']:9.0f}" if "seconds" in row else ""
        print(
            f"{form:26}{row['linear_bytes'] / 1e6:12.1f}{row['perplexity']:12.3f}{change}{took}",
            flush=True,
        )
        record.write_row("quantization", {"form": form, **row, **common})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "outputs/real-model-off-grid")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs/quant-table")
    parser.add_argument("--text", type=Path, help="measured on instead of the standard library's")
    parser.add_argument("--characters", type=int, default=60_000)
    parser.add_argument("--samples", type=int, default=128, help="rows of calibration text")
    parser.add_argument("--forms", nargs="*", help="some of them only")
    parser.add_argument("--peers_python", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--round", type=Path, nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    round_with_gguf(*parsed.round) if parsed.round else main(parsed)
