"""What random weights cannot show, on a small trained model: `make real`.

SmolLM2-135M-Instruct, which `make real-model` and `make chat` fetch, answers, is measured, rounded,
exported, trained and served by the suite's scripts as a user calls them. A line tells what is done;
a table ends the run, and the exit status is 1 where something is not what it has to be.

answers        20 plain questions: every token is that of transformers
perplexity     of a text, beside transformers
quantization   what integers cost, off the grid of the published weights
export         every type: answers in a fresh process are the network's
lora           a held-out loss before and after training, and the adapter in PEFT
forms          JSON and calls of tools over HTTP: valid by grammar; whether right is told
lookup         prompt look-up: its guesses and what they gain

A row of each part's figures goes to benchmarks/results/real.jsonl.
"""

import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import quant_table
import real_learning
import real_parts
import real_served
from real_run import Figure, Part, Run, broken, run_parts, table
from record import ROOT, environment, write_row

PARTS: dict[str, Part] = {
    "answers": real_parts.answers,
    "perplexity": real_parts.perplexity,
    "quantization": real_parts.quantization,
    "export": real_parts.export,
    "lora": real_learning.lora,
    "forms": real_served.forms,
    "lookup": real_served.lookup,
}
PLACE = ROOT / "outputs/real"  # all that is written on the way
_CHARACTERS = 14_000  # of the text


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--model", type=Path, default=ROOT / "outputs/real-model")
    parser.add_argument(
        "--gguf", type=Path, default=ROOT / "outputs/chat/SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    parser.add_argument("--text", type=Path, help="instead of the standard library's strings")
    parser.add_argument("--calibration_file", type=Path, help="likewise, for quantization")
    parser.add_argument("--alpaca", type=Path, help="instruction data to train on")
    parser.add_argument("--peers_python", type=Path, default=ROOT / ".venv-peers/bin/python")
    args = parser.parse_args()
    off_grid = args.model.with_name(f"{args.model.name}-off-grid")
    made = {
        args.model / "config.json": "make real-model",
        off_grid / "config.json": "make real-model",
        args.gguf: "make chat",
        args.peers_python: "make parity",
    }
    for file in filter(None, (*made, args.text, args.calibration_file, args.alpaca)):
        if not file.is_file():
            cure = f"`{made[file]}` makes it" if file in made else "name a file that is"
            parser.error(f"{file} is not there; {cure}")
    args.off_grid = off_grid
    return args


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def start(args: argparse.Namespace) -> Run:
    """Return a run with an empty directory and its texts."""
    shutil.rmtree(PLACE, ignore_errors=True)
    given = {"text": args.text, "calibration_file": args.calibration_file}
    texts = SimpleNamespace(**given, output_dir=PLACE, characters=_CHARACTERS)
    calibration, text = quant_table.write_texts(texts)
    return Run(
        model=args.model,
        gguf=args.gguf,
        off_grid=args.off_grid,
        text=text,
        calibration=calibration.absolute(),
        alpaca=args.alpaca and args.alpaca.absolute(),
        peers_python=args.peers_python,
        place=PLACE,
    )


def basis(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures of a run rest on."""
    strings = "documentation strings of the standard library"
    return {
        "file": run.gguf.name,
        "file_sha256": digest(run.gguf),
        "weights_sha256": digest(run.model / "model.safetensors"),
        "text": args.text.name if args.text else strings,
        "text_sha256": digest(run.text),
        "calibration": args.calibration_file.name if args.calibration_file else strings,
        "calibration_sha256": digest(run.calibration),
        "lora_data": args.alpaca.name if args.alpaca else "the task keyword",
    }


def main() -> int:
    """Run the parts, keep their rows, print the table; return the exit status."""
    args = parse()
    run = start(args)
    rests_on = basis(run, args)

    def keep(part: str, figures: list[Figure]) -> None:
        measured = {one.name: one.value for one in figures}
        row = {"part": part, "figures": measured, "broken": broken(figures), **rests_on}
        write_row("real", row | {"load": os.getloadavg()[0]} | environment())

    found = run_parts(run, {name: PARTS[name] for name in args.parts}, keep)
    print(table(found))
    print(
        f"{rests_on['file']} (SHA-256 {rests_on['file_sha256'][:12]}), text {rests_on['text']} "
        f"({rests_on['text_sha256'][:12]}), calibrated on {rests_on['calibration']} "
        f"({rests_on['calibration_sha256'][:12]}), LoRA on {rests_on['lora_data']}"
    )
    wrong = [f"{part}: {name}" for part, figures in found.items() for name in broken(figures)]
    for name in wrong:
        print(f"not as it has to be: {name}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
