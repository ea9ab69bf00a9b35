"""The configuration loader: precedence, spellings, and what it refuses."""

from dataclasses import dataclass

import pytest
import yaml

from common.ending import run_script
from common.errors import UserError
from common.flags import arg, load, save_resolved
from llm.config.generation import SamplingArguments, WeightsArguments
from llm.config.scripts import SCRIPTS
from llm.config.serving import ServerArguments
from llm.config.training import PretrainArguments

GROUPS = SCRIPTS["run_pretrain.py"]


def parse(*words, groups=GROUPS):
    # A run has to have something to do; evaluation asks for no further flag.
    task: tuple[str, ...] = ("--do_eval",) if groups is GROUPS else ()
    if {"--max_steps", "--train_tokens"} & set(words):
        task = ("--do_train",)
    return load(groups, (*words, *task), prog="script.py")


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 7\nlearning_rate: 1e-3\nsplit: 9,1,0\nreport_to: visualdl\n")
    _, data, run = parse(str(file), "--max_steps", "8", "--bf16=false", "--do_train")
    assert (run.max_steps, run.learning_rate, run.report_to) == (8, 1e-3, ["visualdl"])
    assert (data.split, run.weight_decay) == ("9,1,0", 0.0)


def test_json_reads_like_yaml(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"max_steps": 3, "disable_tqdm": true}')
    run = parse(str(file), "--do_train")[2]
    assert run.max_steps == 3 and run.disable_tqdm


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("min_lr", "min_learning_rate"),
        ("tensor_model_parallel_size", "tensor_parallel_degree"),
        ("pipeline_model_parallel_size", "pipeline_parallel_degree"),
    ],
)
def test_aliases(tmp_path, alias, name):
    value = "0.00001" if alias == "min_lr" else "1"
    train = ("--max_steps", "9")
    assert getattr(parse(f"--{alias}", value, *train)[2], name) == float(value)
    file = tmp_path / "run.yaml"
    file.write_text(f"{alias}: {value}\n")
    assert getattr(parse(str(file), *train)[2], name) == float(value)


def test_spellings_of_one_value():
    for words in (["--do_train"], ["--do-train", "1"], ["--do_train=True"], ["--do_train", "yes"]):
        assert parse(*words, "--max_steps", "1")[2].do_train
    for off in ("--no_do_train", "--no-do-train", "--do_train=false"):
        assert not parse("--do_eval", off)[2].do_train
    with pytest.raises(UserError, match="unknown 'no_max_steps'"):
        parse("--do_train", "--no_max_steps")
    with pytest.raises(UserError, match="do_train is given twice"):
        parse("--do_train", "--no_do_train", "--max_steps", "1")
    assert parse("--train_tokens", "1e9")[2].train_tokens == 10**9
    both = parse("--report_to", "visualdl", "tensorboard", "--max_steps", "1")[2].report_to
    assert both[1] == "tensorboard"
    assert parse("--data_cache", "none")[1].data_cache is None
    assert parse("--report_to", "none")[2].report_to == ["none"]


def test_resolved_config_reproduces_itself(tmp_path):
    groups = parse("--max_steps", "5", "--report_to", "visualdl", "--input_dir", "a: b # c")
    save_resolved(groups, tmp_path / "resolved.yaml")
    file = str(tmp_path / "resolved.yaml")
    assert load(GROUPS, [file], prog="script.py") == groups
    assert [p.name for p in tmp_path.iterdir()] == ["resolved.yaml"]


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("--max_steps", "--min_lr", "cosine", "(default: 949,50,1)"):
        assert name in text


BAD_WORDS = [
    (["--max_step", "3"], "unknown 'max_step'; did you mean 'max_steps'"),
    (["--tensor_paralel_degree", "2"], "did you mean 'tensor_parallel_degree'"),
    (["--zzz", "3"], "unknown 'zzz'; --help lists what there is"),
    (["--max_steps", "--do_train"], "--max_steps needs a value"),
    (["--max_steps", "ten"], "max_steps='ten' is not a valid int"),
    (["--max_steps", "1.5"], "max_steps='1.5' is not a valid int"),
    (["--learning_rate", "nan"], "learning_rate='nan' is not a valid float"),
    (["--learning_rate", "-1"], "learning_rate=-1.0 but the minimum is 0"),
    (["--warmup_ratio", "1.5"], "warmup_ratio=1.5 but the maximum is 1"),
    (["--do_train", "maybe"], "do_train='maybe' is not a valid bool"),
    (["--lr_scheduler_type", "cosin"], "'cosin' is not one of .*did you mean 'cosine'"),
    (["--lr_scheduler_type", "consider"], "is not one of [a-z_, ]+$"),  # nothing is near
    (["--max_steps", "3", "--max_steps", "4"], "given twice, as 3 and as 4"),
    (["--min_lr", "0", "--min_learning_rate", "1e-6"], "min_learning_rate is given twice"),
    (["--max_steps", "none"], "max_steps needs a value of type int"),
    (["run.txt"], "'run.txt' is not a flag"),
    (["--seed", "1", "late.yaml"], "'late.yaml' is not a flag"),
    (["absent.yaml"], "cannot read the config file absent.yaml"),
]


@pytest.mark.parametrize(("words", "message"), BAD_WORDS)
def test_bad_words(words, message):
    with pytest.raises(UserError, match=message):
        parse(*words)


def test_a_list_goes_on_where_its_flag_comes_again():
    server, _ = load(
        SCRIPTS["server.py"], ["--model_alias", "a", "b", "--model_alias", "c"], prog="p"
    )
    assert server.model_alias == ["a", "b", "c"]


BAD_FILES = [
    ("max_stepz: 3", "unknown 'max_stepz'; did you mean 'max_steps'"),
    ("train:\n  max_steps: 3", "'train' is a section"),
    ("- a\n- b", "has to be a mapping"),
    ("a: [1", "is not valid YAML"),
    ("seed: true", "seed='true' is not a valid int"),
    ("max_steps: [1, 2]", "is not a valid int"),
    ("split: {a: 1}", "'split' is a section"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse(str(file))


def test_file_that_is_not_utf8(tmp_path):
    file = tmp_path / "run.json"
    file.write_bytes(b'{"split": "\xff"}')
    with pytest.raises(UserError, match="cannot read the config file"):
        parse(str(file))


CONFLICTS = [
    (["--fp16", "--bf16"], "fp16 and bf16 are both set"),
    (["--bf16"], "bf16 needs a GPU"),
    (["--fp16", "1", "--fp16_opt_level", "O2"], "fp16 needs a GPU"),
    (["--tensor_parallel_degree", "2"], "takes a multiple of 2 processes, launched: 1"),
    (["--max_steps", "1", "--report_to", "none", "visualdl"], "'none' excludes the others"),
    (["--max_steps", "3", "--train_tokens", "9"], "both set; keep one"),
    (["--do_train"], "training needs --max_steps or --train_tokens"),
    (
        ["--min_lr", "1", "--learning_rate", "0.5", "--max_steps", "2"],
        "min_learning_rate=1.0 exceeds",
    ),
]


@pytest.mark.parametrize(("words", "message"), CONFLICTS)
def test_conflicts(words, message):
    with pytest.raises(UserError, match=message):
        parse(*words)


def test_generation_flags():
    sampling, source = parse(
        *("--model_path", "m", "--max_new_tokens", "4"),
        groups=(SamplingArguments, WeightsArguments),
    )
    assert sampling.max_length == 4 and source.model_name_or_path == "m"
    with pytest.raises(UserError, match="model_name_or_path is needed"):
        parse(groups=(WeightsArguments,))
    with pytest.raises(UserError, match="dtype=float16 needs a GPU"):
        parse("--model_path", "m", "--dtype", "float16", groups=(WeightsArguments,))
    with pytest.raises(UserError, match="port=70000 but the maximum is 65535"):
        parse("--port", "70000", groups=(ServerArguments,))


def test_groups_may_not_share_names():
    @dataclass
    class Twice:
        max_steps: int = arg(1, "again")

    with pytest.raises(AssertionError, match="max_steps declared twice"):
        parse(groups=(PretrainArguments, Twice))


def test_user_errors_end_a_script_in_one_line(capsys):
    def main():
        raise UserError("too small; make it larger")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: too small; make it larger\n"

    def broken():
        raise ValueError("a bug, not bad input")

    with pytest.raises(ValueError, match="a bug"):
        run_script(broken)


def test_resolved_file_is_plain_yaml(tmp_path):
    save_resolved(parse(), tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["lr_scheduler_type"] == "linear"
