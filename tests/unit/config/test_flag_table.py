"""The hand-kept tables of the flags' fuzz name every flag of every script, and nothing else."""

import itertools
import re
from pathlib import Path

import pytest

from common.errors import UserError
from common.flags import load
from llm.config.scripts import SCRIPTS
from tests.fuzz.flag_cases import CASES, GROUPS, HELD, SPEED, UNTRIED, flags_of, merged, value_of
from tests.fuzz.flag_modes import MODES


@pytest.mark.parametrize("script", GROUPS)
def test_every_flag_has_a_case_or_stands_in_the_table_of_speed(script):
    cases = CASES[script]
    assert flags_of(script) - UNTRIED == set(cases), "a new flag needs a value to try"
    assert not UNTRIED & set(cases)
    assert not SPEED.keys() & HELD.keys()


def test_every_script_has_modes():
    assert set(SCRIPTS) < set(GROUPS) == set(MODES) == set(CASES)
    every = set().union(*map(flags_of, GROUPS))
    assert every >= UNTRIED, "no flag has this name any more"


@pytest.mark.parametrize("flag", HELD)
def test_who_holds_a_flag_that_is_not_tried_names_it(flag):
    held_by = Path(__file__).resolve().parents[3] / HELD[flag][1]
    assert re.search(rf"\b{flag}\b", held_by.read_text())


@pytest.mark.parametrize("script", [name for name in GROUPS if name != "llm.planner"])
def test_every_mode_is_a_command_line_that_is_taken(script):
    for line in MODES[script].values():
        words = [word for text in line.split() for word in value_of(text, Anywhere())]
        load(GROUPS[script], words, prog=script)


def test_every_case_is_another_value_in_every_mode():
    same = []
    for script, modes in MODES.items():
        for (mode, line), (flag, case) in itertools.product(modes.items(), CASES[script].items()):
            base = merged(line, case.beside)
            other = merged(" ".join(base), f"--{flag} {case.of(mode)}")
            if base == other and case.value != "true":  # `words_of` turns what is true off
                same.append((script, mode, flag))
    assert not same


# What was found silent: script, mode, flag; each is refused by the loader now.
IDLE = [
    ("run_pretrain.py", "eval", "learning_rate"),
    ("run_pretrain.py", "predict", "save_steps"),
    ("run_pretrain.py", "predict", "report_to"),
    ("run_pretrain.py", "predict", "logging_dir"),
    ("run_pretrain.py", "train", "context_parallel_kind"),
    ("run_pretrain.py", "train", "sequence_parallel"),
    ("run_pretrain.py", "train", "amp_master_grad"),
    ("finetune_generation.py", "eval", "packing"),
    ("finetune_generation.py", "eval", "lora"),
    ("finetune_generation.py", "eval", "prefix_tuning"),
    ("finetune_generation.py", "full", "num_train_epochs"),
    ("finetune_generation.py", "eval lora", "merge_weights"),
    ("predict_generation.py", "greedy", "seed"),
    ("evaluate_generation.py", "predictions", "dtype"),
    ("evaluate_generation.py", "predictions", "model_prefix"),
    ("quantize_generation.py", "dequantize", "calibration_file"),
    ("convert_checkpoint.py", "ranks", "max_shard_size"),
    ("convert_checkpoint.py", "compare", "max_shard_size"),
]


class Anywhere(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return f"/{name}"


@pytest.mark.parametrize(("script", "mode", "flag"), IDLE)
def test_an_idle_flag_is_refused_by_name(script, mode, flag):
    words = merged(MODES[script][mode], f"--{flag} {CASES[script][flag].of(mode)}")
    with pytest.raises(UserError, match=flag):
        load(GROUPS[script], [w for t in words for w in value_of(t, Anywhere())], prog=script)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--warmup_ratio 0.1 --warmup_steps 3", "warmup_ratio has no effect beside warmup_steps"),
        ("--save_strategy no --save_steps 3", "save_steps=3 would have no effect beside save_str"),
        ("--save_strategy no --save_total_limit 3", "save_total_limit has no effect beside save_s"),
        ("--do_eval --evaluation_strategy no --eval_steps 3", "evaluation_strategy is not steps"),
        ("--ops fused --use_flash_attention false", "--ops asks for causal_attention=fused"),
        ("--ops reference --use_fused_rms_norm true", "--ops asks for rms_norm=reference"),
        ("--sep_parallel_degree 2", "sep_parallel_degree=2 takes a multiple"),
    ],
)
def test_two_settings_of_one_thing(words, message):
    with pytest.raises(UserError, match=message):
        load(
            SCRIPTS["run_pretrain.py"], ["--do_train", "--max_steps", "9", *words.split()], prog="x"
        )


def test_two_settings_that_agree():
    words = ["--ops", "fused", "--use_flash_attention", "true", "--do_train", "--max_steps", "9"]
    load(SCRIPTS["run_pretrain.py"], words, prog="x")
    words = ["--do_train", "--max_steps", "9", "--do_eval", "--save_strategy", "no"]
    load(SCRIPTS["run_pretrain.py"], [*words, "--save_steps", "3"], prog="x")
