"""Every flag of a pretraining run has an effect, or is refused: one check per flag."""

import contextlib
import dataclasses
import io
import json
import re

import numpy as np
import paddle
import pytest

from common.errors import UserError
from common.flags import load
from llm import runtime
from llm.config.parallel import ParallelArguments
from llm.config.training import PretrainArguments
from llm.parallel.topology import single
from paddlenlp_ext.arguments import training_arguments
from tests.unit.paddlenlp_ext.harness import run

CHECKS = {}


def checks(*names):
    def register(function):
        for name in names:
            assert name not in CHECKS
            CHECKS[name] = function
        return function

    return register


def differs(tmp_path, *flags, base=()):
    """Whether a flag changes the trained weights."""
    without, changed = run(tmp_path / "base", *base), run(tmp_path / "flag", *base, *flags)
    return not np.array_equal(without.weights, changed.weights)


def refuses(message, *words):
    with pytest.raises(UserError, match=message):
        load([PretrainArguments], ["--do_train", "--max_steps", "9", *words], prog="test")


CHANGES_WEIGHTS = {
    "learning_rate": ("--learning_rate", 0.01),
    "lr_scheduler_type": ("--lr_scheduler_type", "constant"),
    "min_learning_rate": ("--min_learning_rate", 0.02),
    "warmup_ratio": ("--warmup_ratio", 0.5),
    "warmup_steps": ("--warmup_steps", 2),
    "decay_steps": ("--decay_steps", 3),
    "weight_decay": ("--weight_decay", 0.1),
    "adam_beta1": ("--adam_beta1", 0.5),
    "adam_beta2": ("--adam_beta2", 0.9),
    "adam_epsilon": ("--adam_epsilon", 0.1),
    "max_grad_norm": ("--max_grad_norm", 0.01, "--adam_epsilon", 1),
    "per_device_train_batch_size": ("--per_device_train_batch_size", 3),
    "gradient_accumulation_steps": ("--gradient_accumulation_steps", 2),
    "max_steps": ("--max_steps", 5),
}


@pytest.mark.parametrize("name", CHANGES_WEIGHTS)
def test_flag_changes_what_is_learnt(name, tmp_path):
    base = ("--adam_epsilon", 1) if name == "max_grad_norm" else ()
    assert differs(tmp_path, *CHANGES_WEIGHTS[name], base=base)


@checks("train_tokens")
def _train_tokens(tmp_path):
    words = ["--do_train", "--train_tokens", "1e3", "--per_device_train_batch_size", "2"]
    (arguments,) = load([PretrainArguments], words, prog="test")
    assert arguments.total_steps(seq_length=6) == 84  # 1000 / (2 * 6), rounded up
    refuses("max_steps and train_tokens are both set", "--train_tokens", "5")


@checks("output_dir", "do_train", "do_eval", "do_predict")
def _stages(tmp_path):
    only = run(tmp_path / "a", "--do_train", "false", "--do_predict")
    assert [path.name for path in only.output_dir.iterdir()] == ["test_results.json"]
    both = run(tmp_path / "b", "--do_eval")
    assert {"eval_results.json", "train_log.jsonl"} <= {p.name for p in both.output_dir.iterdir()}
    assert not (both.output_dir / "test_results.json").exists()


@checks("per_device_eval_batch_size")
def _eval_batch(tmp_path):
    outcome = run(tmp_path, "--do_train", "false", "--do_eval", "--per_device_eval_batch_size", 3)
    assert outcome.model.batches == [3, 2]


@checks("max_evaluate_steps")
def _max_evaluate_steps(tmp_path):
    flags = ("--do_train", "false", "--do_eval", "--per_device_eval_batch_size", 2)
    run(tmp_path, *flags, "--max_evaluate_steps", 1)
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_tokens"] == 12


@checks("eval_steps", "evaluation_strategy")
def _eval_steps(tmp_path):
    outcome = run(tmp_path / "a", "--do_eval", "--eval_steps", 4)
    assert outcome.steps_with("eval_loss") == [4, 6]
    outcome = run(tmp_path / "b", "--do_eval", "--evaluation_strategy", "no")
    assert outcome.steps_with("eval_loss") == [6]
    refuses("strategy is not steps", "--do_eval", "--eval_steps", "4", "--evaluation_strategy=no")


@checks("eval_on_start")
def _eval_on_start(tmp_path):
    outcome = run(tmp_path, "--do_eval", "--eval_steps", 4, "--eval_on_start", "true")
    assert outcome.steps_with("eval_loss") == [0, 4, 6]
    refuses("eval_on_start is given but do_eval is off; add --do_eval", "--eval_on_start")


@checks("logging_steps", "logging_first_step")
def _logging_steps(tmp_path):
    assert run(tmp_path / "a", "--logging_steps", 4).steps_with("loss") == [4, 6]
    outcome = run(tmp_path / "b", "--logging_steps", 4, "--logging_first_step", "true")
    assert outcome.steps_with("loss") == [1, 4, 6]


@checks("save_strategy", "save_steps", "save_total_limit")
def _save_steps(tmp_path):
    steps = ("--save_strategy", "steps", "--save_steps", 2)
    names = ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert run(tmp_path / "a", *steps).checkpoints == names
    assert run(tmp_path / "b", *steps, "--save_total_limit", 1).checkpoints == names[2:]
    assert run(tmp_path / "c").checkpoints == []
    uneven = run(tmp_path / "d", "--save_strategy", "steps", "--save_steps", 4)
    assert uneven.checkpoints == ["checkpoint-4", "checkpoint-6"]


@checks("ignore_data_skip")
def _ignore_data_skip(tmp_path):
    steps = ("--save_strategy", "steps", "--save_steps", 3)
    run(tmp_path, *steps)
    checkpoint = str(tmp_path / "checkpoint-3")
    run(tmp_path, resume=checkpoint, trace=tmp_path / "on")
    run(
        tmp_path,
        "--resume_from_checkpoint",
        checkpoint,
        "--ignore_data_skip",
        resume=checkpoint,
        trace=tmp_path / "again",
    )
    seen = [
        [int(line.split()[1]) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("on", "again")
    ]
    assert seen[0][:2] == [6, 7] and seen[1][:2] == [0, 1]


@checks("dataloader_num_workers")
def _workers(tmp_path):
    here = run(tmp_path / "a", trace=tmp_path / "one")
    there = run(tmp_path / "b", "--dataloader_num_workers", 2, trace=tmp_path / "two")
    processes = [
        {line.split()[0] for line in (tmp_path / name).read_text().splitlines()}
        for name in ("one", "two")
    ]
    assert len(processes[0]) == 1 and len(processes[1]) == 2 and not processes[0] & processes[1]
    assert np.array_equal(here.weights, there.weights)


@checks("report_to", "logging_dir")
def _report_to(tmp_path):
    from visualdl import LogReader

    run(tmp_path / "a", "--report_to", "visualdl", "--do_eval")
    (file,) = (tmp_path / "a" / "runs").iterdir()
    scalars = LogReader(file_path=str(file)).get_tags()["scalar"]
    assert {"train/loss", "train/mfu", "train/grad_norm", "eval/perplexity"} <= set(scalars)
    run(tmp_path / "b", "--report_to", "visualdl", "--logging_dir", tmp_path / "events")
    assert len(list((tmp_path / "events").iterdir())) == 1
    assert not (tmp_path / "b" / "runs").exists()
    refuses("'none' excludes the others", "--report_to", "none", "visualdl")
    refuses("'wandb' is not one of none, visualdl, tensorboard", "--report_to", "wandb")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@checks("disable_tqdm")
def _disable_tqdm(tmp_path):
    said = {}
    for word, kind in (("false", Terminal), ("true", Terminal), ("false ", io.StringIO)):
        with contextlib.redirect_stderr(kind()) as said[word]:
            run(tmp_path / word.replace(" ", "_"), "--disable_tqdm", word.strip())
    assert "training: 100%" in said["false"].getvalue()
    assert "pretrain:" not in said["true"].getvalue()
    assert "pretrain:" not in said["false "].getvalue()  # not a terminal


@checks("seed")
def _seed(tmp_path):
    outcome = run(tmp_path / "a", "--seed", 5)
    assert outcome.trainer.args.seed == 5
    drawn = [run(tmp_path / f"s{s}", "--seed", s) and paddle.rand([2]).tolist() for s in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


@checks("device")
def _device(tmp_path):
    if paddle.device.is_compiled_with_cuda():
        pytest.skip("this paddle can use a GPU")
    (arguments,) = load([PretrainArguments], ["--do_eval", "--device", "gpu"], prog="test")
    with pytest.raises(UserError, match=r"device=gpu, but paddle .* has cpu here; for a GPU"):
        runtime.load_paddle(arguments.device)
    refuses("device='cuda:1' is called 'gpu:1' here", "--device", "cuda:1")


@checks("fp16", "bf16", "fp16_opt_level", "scale_loss", "recompute")
def _precision(tmp_path):
    refuses("fp16 needs a GPU", "--fp16")
    refuses("bf16 needs a GPU", "--bf16", "true", "--device", "cpu")
    refuses("fp16 and bf16 are both set", "--fp16", "--bf16", "--device", "gpu")
    refuses("fp16_opt_level='O3' is not one of O0, O1, O2", "--fp16_opt_level", "O3")
    words = ["--do_train", "--max_steps", "1", "--device", "gpu", "--fp16", "--recompute"]
    words += ["--fp16_opt_level", "O2", "--scale_loss", "1024", "--output_dir", str(tmp_path)]
    (arguments,) = load([PretrainArguments], words, prog="test")
    theirs = training_arguments(arguments, 1, single())
    assert (theirs.fp16, theirs.fp16_opt_level, theirs.scale_loss) == (True, "O2", 1024)
    assert theirs.recompute is True


def test_degrees_that_one_process_cannot_have():
    refuses("'stage4' is not one of stage1, stage2, stage3, offload", "--sharding", "stage4")
    refuses("takes a multiple of 2 processes, launched: 1", "--tensor_model_parallel_size", "2")
    refuses("takes a multiple of 2 processes, launched: 1", "--pipeline_parallel_degree", "2")


# What these do is shown in test_pretrain_plan.py and test_pretrain.py.
ELSEWHERE = {"overwrite_output_dir", "resume_from_checkpoint", "threads"}
# Those of several processes, in tests/unit/parallel and tests/distributed.
ELSEWHERE |= {field.name for field in dataclasses.fields(ParallelArguments)}
ELSEWHERE |= {"recompute_granularity", "recompute_num_layers", "recompute_offload"}
ELSEWHERE |= {"amp_master_grad", "async_save", "distributed_timeout"}
ELSEWHERE |= {"warmup_tokens", "decay_tokens"}  # tests/unit/train/test_pretrain_blends.py
ELSEWHERE |= {"fp8"}  # tests/device/test_fp8.py


@pytest.mark.parametrize("function", sorted(set(CHECKS.values()), key=lambda f: f.__name__))
def test_flag(function, tmp_path):
    function(tmp_path)


def test_every_flag_is_covered():
    names = {field.name for field in dataclasses.fields(PretrainArguments)}
    assert names == set(CHANGES_WEIGHTS) | set(CHECKS) | ELSEWHERE


def test_unknown_flags_name_the_nearest(tmp_path):
    for word, near in [("--save_step", "save_steps"), ("--min_lr_rate", "min_lr")]:
        refuses(re.escape(near), word, "1")
