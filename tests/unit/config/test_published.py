"""Files and command lines that other programs publish, and what becomes of each setting."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.flag_registry import Registry
from common.flags import arg, load
from common.foreign import Becomes, Idle, Only, Program, Sets
from llm.config.scripts import SCRIPTS
from llm.planner.__main__ import script_of
from scripts.migrate_tables import PAGES, ROOT, page
from tests.unit.config.published_names import NAMES
from tests.unit.config.published_others import OTHERS
from tests.unit.config.published_paddlenlp import PADDLENLP

PUBLISHED = PADDLENLP | OTHERS
TAKEN = [name for name, one in PUBLISHED.items() if one.without or not one.refused]
RANKS = 8


@pytest.fixture(autouse=True)
def _processes(monkeypatch):
    # As many as the files' layouts need: degrees are not what is tested here.
    for module in ("parallel", "megatron"):
        monkeypatch.setattr(f"llm.config.{module}.launched", lambda: RANKS)


def taken(name: str, directory: Path, *words: str) -> dict[str, Any]:
    """Return the flags of ours that a published file sets, without what is refused in it."""
    one = PUBLISHED[name]
    if one.script in ("run_pretrain.py", "finetune_generation.py"):
        # Half precision is a GPU's.
        words = ("--bf16", "false", "--device", "cpu", *words)
    published = [word for word in one.words(directory, mended=True) if word != "--bf16"]
    words = (*published, *words)
    groups = load(SCRIPTS[one.script], words, prog=one.script)
    return {name: value for group in groups for name, value in vars(group).items()}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_published_is_taken(name, tmp_path):
    taken(name, tmp_path)


@pytest.mark.parametrize("name", [name for name, one in PUBLISHED.items() if one.refused])
def test_what_has_no_counterpart_is_named_all_at_once(name, tmp_path):
    one = PUBLISHED[name]
    with pytest.raises(UserError) as error:
        load(SCRIPTS[one.script], one.words(tmp_path), prog=one.script)
    for part in one.refused:
        assert part in str(error.value)


# What some of them are here; each value was worked out from the other program's source.
BECOMES: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 2048, "src_length": 1024, "tgt_length": None, "sharding": "stage2"},
    "lora": {"lora": True, "do_eval": True, "eval_steps": 1, "load_best_model_at_end": True},
    "flashmask lora": {"packing": True, "load_best_model_at_end": False, "max_length": 8192},
    "dpo": {"dpo": True, "max_length": 4096, "src_length": 2048, "packing": False, "dpo_beta": 0.1},
    "flashmask dpo": {"dpo": True, "max_length": 8192, "src_length": 8000, "max_steps": 4000},
    "pretrain": {"warmup_steps": 30, "warmup_ratio": 0.0, "eval_steps": 1000},
    "ptq": {
        "quant_type": "A8W8",
        "smooth": 0.5,
        "calibration_samples": 128,
        "calibration_length": 2048,
        "dataset_path": "./data",
    },
    "ptq_c8": {"quant_type": "A8W8"},
    "gptq": {"quant_type": "W4", "method": "gptq", "scaling": "none", "calibration_samples": 64},
    "awq": {
        "quant_type": "W4",
        "method": "rtn",
        "scaling": "search",
        "smooth": 0.0,
        "calibration_samples": 128,
    },
    "fp8_ptq": {"quant_type": "A8W8", "dataset_path": None},
    "export": {"output_path": "./inference/model"},
    "predictor static": {"model_dir": "./inference", "model_prefix": "model"},
    "predictor cache": {"cache_dtype": "int8"},
    "merge": {"output_dir": "./checkpoints/lora_merge"},
    "lf lora sft": {
        "lora": True,
        "lora_target_modules": ["all-linear"],
        "max_length": 2048,
        "src_length": 2047,
        "max_samples": 1000,
        "chat_template": "llama3",
        "distributed_timeout": 180000000,
    },
    "lf lora dpo": {"dpo": True, "dpo_loss_type": "sigmoid", "learning_rate": 5e-6},
    "lf full sft": {"lora": False, "sharding": "stage3"},
    "lf qlora sft": {"weight_quantize_algo": "weight_only_int4", "dev_ratio": 0.1, "do_eval": True},
    "lf merge": {"output_dir": "output/llama3_lora_sft", "device": "cpu"},
    "lf inference": {"lora_path": "saves/llama3-8b/lora/sft", "chat": True},
    "mindformers finetune": {
        "num_train_epochs": 2.0,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine",
        "sharding": "stage1",
        "sharding_parallel_degree": 8,
        "recompute": True,
        "save_steps": 10000,
        "max_length": 8192,
        "max_grad_norm": 1.0,
    },
    "mindformers pretrain": {"max_seq_length": 8192, "max_steps": 10},
    "megatron": {
        "gradient_accumulation_steps": 128 // RANKS,
        "max_steps": 1953125000 // 128,
        "decay_steps": 1949218748 // 128,
        "warmup_steps": 3906252 // 128,
        "sharding": "stage1",
        "distributed_timeout": 3600,
        "do_eval": True,
        "report_to": ["tensorboard"],
    },
    "pai": {"max_steps": 1000, "recompute": True, "recompute_num_layers": None},
}


@pytest.mark.parametrize("name", BECOMES)
def test_what_it_becomes(name, tmp_path):
    found = taken(name, tmp_path)
    assert {flag: found[flag] for flag in BECOMES[name]} == BECOMES[name]


def test_each_setting_without_effect_is_told_once_with_why(tmp_path, capsys):
    taken("sft", tmp_path)
    said = capsys.readouterr().err
    assert said.count("unified_checkpoint") == 1 == said.count("eval_accumulation_steps")
    assert "without effect: unified_checkpoint (checkpoints are complete" in said


SAID = [
    ({"lora": True, "rslora": True}, "lora_alpha: it is 16 here, twice the rank, and 4 there"),
    (
        {"unified_checkpoint": True},
        "num_train_epochs=3.0 (there 1.0), logging_steps=10 (there 500)",
    ),
    ({"max_length": 2048, "lazy": True}, "on_long: truncate cuts them"),
    ({"lazy": True, "evaluation_strategy": "epoch"}, "do_eval is on, as evaluation_strategy=epoch"),
    ({"lazy": True, "max_steps": 3, "num_train_epochs": 2}, "num_train_epochs (beside max_steps"),
]


@pytest.mark.parametrize(("settings", "line"), SAID)
def test_the_same_words_that_mean_something_else_are_said(settings, line, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"dataset_path": "d", "do_train": True, **settings}))
    load(SCRIPTS["finetune_generation.py"], [str(file)], prog="x")
    assert line in capsys.readouterr().err


def test_a_file_of_our_own_is_held_to_its_modes_and_says_nothing(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("dataset_path: d\ndo_train: true\nmax_steps: 3\n")
    load(SCRIPTS["finetune_generation.py"], [str(file)], prog="x")
    assert not capsys.readouterr().err
    file.write_text(file.read_text() + "num_train_epochs: 2\n")
    with pytest.raises(UserError, match="num_train_epochs has no effect beside max_steps above 0"):
        load(SCRIPTS["finetune_generation.py"], [str(file)], prog="x")


def test_of_a_launch_one_process_says_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    taken("sft", tmp_path)
    assert not capsys.readouterr().err


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"zzz": 1, "vera": true, "max_steps": "ten", "unifed_checkpoint": true}')
    with pytest.raises(UserError) as error:
        load(SCRIPTS["finetune_generation.py"], [str(file)], prog="x")
    lines = str(error.value).split("\n")
    assert len(lines) == 4 and all(line.startswith(f"{file}: ") for line in lines)
    assert "unknown 'zzz'" in lines[0] and "vera=True has no counterpart" in lines[1]
    assert "max_steps='ten' is not a valid int" in lines[2]
    assert lines[3].endswith("did you mean 'unified_checkpoint'?")
    with pytest.raises(UserError, match=r"unknown 'zzz'.*\n.*unknown 'yyy'"):
        load(SCRIPTS["finetune_generation.py"], ["--zzz", "1", "2", "--yyy"], prog="x")


def test_the_command_line_goes_before_what_a_setting_becomes(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"max_seq_len": 512, "loss_type": "ipo", "dataset_path": "d", "do_train": 1}')
    words = [str(file), "--max_length", "2000", "--dpo_loss_type", "hinge"]
    _, data, adaptation, _, _ = load(SCRIPTS["finetune_generation.py"], words, prog="x")
    assert (data.max_length, adaptation.dpo, adaptation.dpo_loss_type) == (2000, True, "hinge")


def test_a_name_of_llama_factorys_index_is_its_file(tmp_path):
    (tmp_path / "dataset_info.json").write_text(
        '{"mine": {"file_name": "mine.json"}, "other": {"hf_hub_url": "a/b"},'
        ' "renamed": {"file_name": "r.json", "columns": {"prompt": "q"}}}'
    )
    file = tmp_path / "run.yaml"

    def tuned(dataset: str) -> Any:
        file.write_text(
            f"stage: sft\ndo_train: true\ndataset: {dataset}\ndataset_dir: {tmp_path}\n"
        )
        return load(SCRIPTS["finetune_generation.py"], [str(file)], prog="x")[1]

    assert tuned("mine").dataset_path == str(tmp_path / "mine.json")
    for dataset in ("other", "mine,other", "absent"):
        with pytest.raises(
            UserError, match=rf"dataset={dataset} is not one file of .*dataset_path"
        ):
            tuned(dataset)
    with pytest.raises(UserError, match="renames its columns"):
        tuned("renamed")


@pytest.mark.parametrize(
    ("name", "words"), [("dpo", []), ("mindformers finetune", ["--dataset_path", "d"])]
)
def test_the_planner_knows_whose_script_it_is_for(name, words, tmp_path):
    words = [*PUBLISHED[name].words(tmp_path)[:1], *words]
    assert script_of(words) == SCRIPTS["finetune_generation.py"]
    assert script_of(PUBLISHED["pretrain"].words(tmp_path)) == SCRIPTS["run_pretrain.py"]


# Of mindformers' files for Llama 2: what is beside these settings decides.
OLDER = {
    "a model's name": ({"model": {"model_config": {"checkpoint_name_or_path": "llama2_7b"}}}, {}),
    "no pipeline": (
        {
            "runner_config": {"gradient_accumulation_steps": 8},
            "parallel_config": {"micro_batch_num": 1},
        },
        {"gradient_accumulation_steps": 8},
    ),
    "no evaluation": ({"eval_step_interval": -1, "eval_epoch_interval": -1}, {"eval_steps": None}),
    "evaluation": ({"eval_step_interval": 40, "do_eval": True}, {"eval_steps": 40}),
    "a file": (
        {"model": {"model_config": {"checkpoint_name_or_path": "/ckpt/llama.ckpt"}}},
        "checkpoint_name_or_path=/ckpt/llama.ckpt has no counterpart here",
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_settings_of_mindformers_that_others_decide(name, tmp_path):
    settings, wanted = OLDER[name]
    common = {"run_mode": "train", "output_dir": "o", "trainer": {"model_name": "llama2_7b"}}
    (tmp_path / "f.yaml").write_text(json.dumps(common | settings))
    words = [str(tmp_path / "f.yaml"), "--dataset_path", "d", "--model_name_or_path"]
    words.append("__internal_testing__/tiny-random-llama")
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            load(SCRIPTS["finetune_generation.py"], words, prog="finetune_generation.py")
        return
    groups = load(SCRIPTS["finetune_generation.py"], words, prog="finetune_generation.py")
    found = {k: v for group in groups for k, v in dataclasses.asdict(group).items()}
    assert {key: found[key] for key in wanted} == wanted


# Tables against flags.


def rows():
    for script, groups in SCRIPTS.items():
        registry = Registry(groups)
        for program in registry.programs:
            for name, row in program.rows.items():
                yield script, registry, program, name, row


@pytest.mark.parametrize("of", NAMES, ids=" ".join)
def test_what_a_parser_of_theirs_knows_is_known(of):
    """A flag, or a row of the script's: unknown is what nobody has."""
    registry = Registry(SCRIPTS[of[0]])
    assert of[1] in [program.name for program in registry.programs]
    unknown = [
        name
        for name in NAMES[of].split()
        if registry.find(name) is None and not any(p.row(name) for p in registry.programs)
    ]
    assert not unknown


def test_every_row_leads_to_a_flag_of_its_script():
    wrong = [
        (script, name, row.flag)
        for script, registry, _, name, row in rows()
        if isinstance(row, Becomes) and registry.find(row.flag) is None
    ]
    assert not wrong


def test_no_row_takes_a_flag_of_ours_away():
    wrong = [
        (script, program.name, name)
        for script, registry, program, name, row in rows()
        if registry.find(name) is not None and isinstance(row, Idle | Only)
    ]
    assert not wrong, "a flag that is there now: the row goes"


def test_rows_of_two_programs_for_a_flag_of_ours_would_be_one_too_many():
    seen: dict[tuple[str, str], set[str]] = {}
    for script, registry, program, name, _ in rows():
        if registry.find(name) is not None:
            seen.setdefault((script, name), set()).add(program.name)
    assert not [at for at, programs in seen.items() if len(programs) > 1]


@pytest.mark.parametrize("place", PAGES)
def test_pages_are_what_the_tables_say(place):
    assert (ROOT / place).read_text(encoding="utf-8") == page(place), "make migrate-tables"


def test_the_page_names_what_is_published():
    text = (ROOT / "docs/migrate.md").read_text(encoding="utf-8")
    files = {name for name in PADDLENLP if PADDLENLP[name].settings and " " not in name}
    assert not [name for name in files if f"{name}_argument.json" not in text]


# The kinds of rows on a group made for it.


@dataclasses.dataclass
class Group:
    """Some flags."""

    FOREIGN = (
        Program(
            "Theirs",
            {
                "size": Becomes("width", values={"big": 9}, refused={"huge": "write big"}),
                "both": Sets(lambda value, beside: {"width": value, "deep": True}, "two flags"),
                "odd": Only((1, None), "it is 1"),
                "part.*": Idle("parts are one"),
                "part.own": Becomes("width"),
            },
            completes=lambda values: (),
        ),
    )
    width: int = arg(1, "a number")
    deep: bool = arg(False, "a switch")


@pytest.mark.parametrize(
    ("text", "width", "deep"),
    [
        ("size: 3", 3, False),
        ("size: BIG", 9, False),
        ("both: 4", 4, True),
        ("odd: 1\nwidth: 2", 2, False),
        ("part:\n  own: 5\n  deep: {a: 1}", 5, False),
    ],
)
def test_kinds_of_rows(text, width, deep, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    (group,) = load([Group], [str(file)], prog="x")
    assert (group.width, group.deep) == (width, deep)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: huge", "size=huge has no counterpart here: write big"),
        ("odd: 2", "odd=2 has no counterpart here: it is 1"),
        ("size: 3\nwidth: 4", "width is given twice, as 3 and as 4"),
        ("other:\n  own: 5", "'other' is a section"),
    ],
)
def test_kinds_of_refusals(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load([Group], [str(file)], prog="x")
