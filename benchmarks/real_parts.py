"""The parts of `make real`: each asks the suite's scripts as a user would, and compares."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from real_asked import QUESTIONS
from real_run import Figure, Run, gone, read_json, read_lines

MOST = 64  # tokens of an answer
_WINDOW = 512  # tokens that text is read in
# Sums of some thousand float32 logarithms in other orders.
_SAME = 1e-5
_EXPORT_QUESTIONS = 4


def answers_of(
    run: Run, model: Sequence[str | Path], script: str = "predict_generation.py", count: int = 0
) -> list[dict]:
    """Return what a script answers to the questions, in their order.

    Args:
        model: flags that say what is opened, and how.
        script: that answers.
        count: of questions; all.
    """
    asked, answered = run.place / "questions.jsonl", run.place / "answers.jsonl"
    questions = [one.text for one in QUESTIONS[: count or len(QUESTIONS)]]
    asked.write_text("".join(f"{json.dumps(one)}\n" for one in questions), encoding="utf-8")
    answered.unlink(missing_ok=True)
    run.suite(
        script,
        *(*model, "--chat", "true", "--max_length", str(MOST)),
        *("--data_file", asked, "--output_file", answered),
    )
    found = {row["prompt"]: row for row in read_lines(answered)}
    return [found[one] for one in questions]


def opened(place: Path, dtype: str = "float32") -> list[str | Path]:
    """Return the flags that open a model."""
    # Weights that are asked once are not kept a second time.
    return ["--model_name_or_path", place, "--dtype", dtype, "--packed_cache", "off"]


def equal(name: str, ours: Sequence[dict], theirs: Sequence[dict]) -> Figure:
    """Return how many answers have the same prompt and the same tokens; all are demanded."""
    same = sum(
        one["prompt_ids"] == other["prompt_ids"] and one["ids"] == other["ids"]
        for one, other in zip(ours, theirs, strict=True)
    )
    return Figure(name, f"{same} of {len(ours)}", "all", held=same == len(ours))


def answers(run: Run) -> list[Figure]:
    """Plain questions, beside transformers in float32, token by token."""
    run.say("transformers")
    theirs = run.peer([one.text for one in QUESTIONS], most=MOST)["answers"]
    run.say("float32")
    ours = answers_of(run, opened(run.model))
    run.say("the published file")
    published = answers_of(run, opened(run.gguf))
    run.say("bfloat16")
    half = answers_of(run, opened(run.model, "bfloat16"))
    right = sum(one.is_right(row["output"]) for one, row in zip(QUESTIONS, ours, strict=True))
    same = sum(one["ids"] == other["ids"] for one, other in zip(ours, half, strict=True))
    return [
        equal("greedy ids are transformers'", ours, theirs),
        equal("those of the published GGUF file, too", published, theirs),
        Figure("smallest lead of a chosen logit", min(one["lead"] for one in theirs)),
        Figure("bfloat16 gives the same text", f"{same} of {len(ours)}"),
        Figure("right answers", f"{right} of {len(ours)}"),
    ]


def measure(run: Run, model: Sequence[str | Path]) -> float:
    """Return a model's perplexity per token on the text."""
    scores = run.place / "scores.json"
    run.suite(
        "evaluate_generation.py",
        *(*model, "--task", "perplexity", "--data_file", run.text, "--text_format", "txt"),
        *("--max_length", str(_WINDOW), "--stride", str(_WINDOW), "--output_file", scores),
    )
    (result,) = read_json(scores)["results"]
    return float(result["figures"]["token_perplexity"])


def perplexity(run: Run) -> list[Figure]:
    """Perplexity of a text, beside transformers' in float32."""
    run.say("transformers")
    theirs = run.peer(text=run.text, window=_WINDOW)
    wanted = math.exp(theirs["loss"] / theirs["tokens"])
    run.say("float32")
    ours = measure(run, opened(run.model))
    run.say("bfloat16")
    half = measure(run, opened(run.model, "bfloat16"))
    run.say("a cache of 8 bits")
    cache = measure(run, [*opened(run.model), "--cache_dtype", "int8"])
    apart = abs(ours / wanted - 1)
    return [
        Figure("tokens of the text", theirs["tokens"]),
        Figure("transformers", wanted),
        Figure("float32", ours),
        Figure("apart, as a share", apart, f"{_SAME:.0e} at most", apart <= _SAME),
        Figure("bfloat16, change in %", 100 * (half / ours - 1)),
        Figure("cache of 8 bits, change in %", 100 * (cache / ours - 1)),
    ]


@dataclass(frozen=True)
class Rounding:
    """A form of integers, by the flags of quantize_generation.py.

    Args:
        name: of its figure.
        flags: that make it.
        most: change of perplexity in percent that it may cost; None where it is reported only.
    """

    name: str
    flags: tuple[str, ...]
    most: float | None = None

    def place(self, run: Run) -> Path:
        """Return where it is written."""
        return run.place / self.name.replace(" ", "-")


_32 = ("--group_size", "32")
NEAREST = ("--method", "rtn")
# By what they round alone; what `make quant-table` shows of 13 forms takes an hour.
ROUNDINGS = {
    "W8": Rounding("W8", ("--quant_type", "W8"), 3.0),
    "A8W8": Rounding("A8W8", ("--quant_type", "A8W8"), 8.0),
    "W4": Rounding("W4 to the nearest", ("--quant_type", "W4", *_32, *NEAREST)),
    "A8W4": Rounding("A8W4 to the nearest", ("--quant_type", "A8W4", *_32, *NEAREST)),
}
_SAMPLES = 32
CALIBRATED = Rounding("W4 by GPTQ", ("--quant_type", "W4", *_32, "--scaling", "none"))


def quantize(run: Run, form: Rounding, *flags: str | Path) -> Path:
    """Return a directory of the model in a form, made where it is not there yet."""
    place = form.place(run)
    if not (place / "quantization_report.json").exists():
        words = ("--model_name_or_path", run.off_grid, "--output_dir", place)
        run.suite("quantize_generation.py", *words, *form.flags, *flags)
    return place


def quantization(run: Run) -> list[Figure]:
    """What integers cost, off the grid of the published weights, which are rounded already."""
    run.say("unrounded")
    before = measure(run, opened(run.off_grid))
    found, changes = [Figure("unrounded", before)], {}
    text = ("--calibration_file", run.calibration, "--calibration_samples", str(_SAMPLES))
    for form in (*ROUNDINGS.values(), CALIBRATED):
        run.say(form.name)
        place = quantize(run, form, *(text if form is CALIBRATED else ()))
        change = 100 * (measure(run, opened(place)) / before - 1)
        changes[form] = change
        if form is CALIBRATED:
            limit = changes[ROUNDINGS["W4"]]
            demand, held = "less than to the nearest", change < limit
        elif form.most is None:
            demand, held = "", True
        else:
            demand, held = f"below {form.most:g}", abs(change) < form.most
        found.append(Figure(f"{form.name}, change in %", change, demand, held))
    return found


def export(run: Run) -> list[Figure]:
    """Every type as a program, whose answers in a fresh process are the network's."""
    integers = {name: quantize(run, form) for name, form in ROUNDINGS.items()}
    kinds: dict[str, list[str | Path]] = {
        "float32": opened(run.model),
        "bfloat16": opened(run.model, "bfloat16"),
        **{name: opened(place) for name, place in integers.items()},
        **{f"{name}, bfloat16": opened(integers[name], "bfloat16") for name in ("W8", "W4")},
        "bfloat16, cache of 8 bits": [*opened(run.model, "bfloat16"), "--cache_dtype", "int8"],
    }
    found = []
    program = run.place / "program"
    for name, model in kinds.items():
        run.say(name)
        with gone(program):
            run.suite("export_generation_model.py", *model, "--output_path", program / "llama")
            theirs = answers_of(
                run, ["--model_dir", program], "infer_generation.py", _EXPORT_QUESTIONS
            )
        ours = answers_of(run, model, count=_EXPORT_QUESTIONS)
        found.append(equal(f"{name}: infer's ids are predict's", theirs, ours))
    return found
