"""LoRA on a trained model, for `make real`: loss on examples that training has not seen."""

import sys
from pathlib import Path

from real_asked import QUESTIONS
from real_parts import MOST, answers_of, equal, opened
from real_run import Figure, Run, read_lines
from record import ROOT

sys.path.insert(0, str(ROOT))

from data.conversations.make_task import make_task

_RULE, _TRAIN, _HELD_OUT = "keyword", 480, 64
_STEPS = 60
_LORA = ("--lora", "true", "--lora_rank", "16", "--learning_rate", "5e-4", "--seed", "1")
# Of ALPACA's examples; answers of any length are scored by their loss alone.
_ALPACA = ("--dev_ratio", "0.08", "--src_length", "192", "--tgt_length", "192")
_ALPACA += ("--on_long", "truncate", "--per_device_train_batch_size", "4")
_TASK = ("--src_length", "128", "--tgt_length", "8", "--eval_with_do_generation", "true")
_TASK += ("--per_device_train_batch_size", "8")
_PEFT_QUESTIONS = 3


def lora(run: Run) -> list[Figure]:
    """Train an adapter: the held-out loss falls, and PEFT answers with it as the suite does."""
    adapter, task = run.place / "lora", run.place / _RULE
    if run.alpaca is None:
        make_task(_RULE, task, train=_TRAIN, dev=_HELD_OUT)
    data = (task, *_TASK) if run.alpaca is None else (run.alpaca, *_ALPACA)
    run.say(f"{_STEPS} updates")
    run.suite(
        "finetune_generation.py",
        *("--model_name_or_path", run.model, "--output_dir", adapter, "--dataset_path", *data),
        *(*_LORA, "--max_steps", str(_STEPS), "--lr_scheduler_type", "cosine"),
        *("--warmup_steps", "6", "--do_train", "--do_eval", "--eval_on_start", "true"),
        *("--evaluation_strategy", "steps", "--eval_steps", str(_STEPS), "--save_strategy", "no"),
        *("--device", "cpu", "--disable_tqdm", "true", "--overwrite_output_dir", "true"),
    )
    seen = [row for row in read_lines(adapter / "train_log.jsonl") if "eval_loss" in row]
    before, after = seen[0], seen[-1]
    fell = after["eval_loss"] < before["eval_loss"]
    found = [
        Figure("held-out loss before", before["eval_loss"]),
        Figure("held-out loss after", after["eval_loss"], "less than before", fell),
    ]
    if run.alpaca is None:
        found += [
            Figure(f"held-out answers right {when}, in %", row["eval_exact_match"])
            for when, row in (("before", before), ("after", after))
        ]
    return [*found, _beside_peft(run, adapter)]


def _beside_peft(run: Run, adapter: Path) -> Figure:
    """Return whether PEFT, with the adapter's files as they are, gives the same tokens."""
    run.say("the adapter in PEFT")
    asked = [one.text for one in QUESTIONS[:_PEFT_QUESTIONS]]
    theirs = run.peer(asked, most=MOST, adapter=adapter)["answers"]
    model = [*opened(run.model), "--lora_path", adapter]
    return equal("greedy ids are PEFT's", answers_of(run, model, count=_PEFT_QUESTIONS), theirs)
