"""Going on from an adapter: its files settle what flags set for a new one, or both are named."""

import json

import pytest
import yaml

from common.errors import UserError
from common.flags import load
from llm.config.scripts import SCRIPTS
from llm.llama.config import load_config
from llm.train.checks import as_json
from llm.train.finetune_plan import plan_finetune

TINY = "__internal_testing__/tiny-random-llama"
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
LORA |= {"target_modules": ["q_proj", "v_proj"]}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 6, "prefix_projection": True}
PREFIX |= {"encoder_hidden_size": 32}


def write_adapter(path, content):
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(content))
    return path


def write_checkpoint(place, content, *, config=None, base=None):
    path = place / "out" / "checkpoint-3"
    if content is not None:
        write_adapter(path, content)
    path.mkdir(parents=True, exist_ok=True)
    state = {"consumed_samples": 12, "samples_per_step": 8}
    state |= {} if base is None else {"base_model": base}
    (path / "loader_state.json").write_text(json.dumps(state))
    (path / "trainer_state.json").write_text(json.dumps({"max_steps": 9}))
    (path / "run_config.yaml").write_text(yaml.safe_dump(config or {"lora_rank": 8}))
    files = {
        file.name: file.stat().st_size for file in path.iterdir() if file.name != "complete.json"
    }
    (path / "complete.json").write_text(json.dumps({"step": 3, "files": files}))
    return path


@pytest.fixture
def plan(tmp_path):
    lines = [json.dumps({"src": f"Say {n}.", "tgt": f"It is {n}."}) for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))

    def made(*words, model=TINY):
        words = ["--model_name_or_path", model, "--do_train", *map(str, words)]
        words += ["--dataset_path", str(tmp_path / "train.jsonl")]
        words += ["--output_dir", str(tmp_path / "out"), "--chat_template", "plain"]
        groups = load(SCRIPTS["finetune_generation.py"], words, prog="x")
        return plan_finetune(groups), groups[2]

    return made


CONTRADICTIONS = [
    (LORA, "lora", "--lora_rank 16", "lora_rank=16, .* r=4 "),
    (LORA, "lora", "--lora_rank 8", "lora_rank=8, .* r=4 "),
    (LORA, "lora", "--lora_alpha 9", "lora_alpha=9, .* lora_alpha=8 "),
    (LORA, "lora", "--lora_dropout 0.3", "lora_dropout=0.3, .* lora_dropout=0.0 "),
    (LORA, "lora", "--lora_target_modules q_proj", "q_proj, .*target_modules=q_proj v_proj "),
    (LORA, "lora", "--rslora true", "rslora=True, .* use_rslora=False "),
    (LORA, "lora", "--use_dora true", "use_dora=True, .* use_dora=False "),
    (LORA, "lora", "--pissa true", "pissa=True, .* pissa=False "),
    (LORA, "lora", "--modules_to_save norm", "modules_to_save=norm, .* modules_to_save=none "),
    (PREFIX, "prefix_tuning", "--num_prefix_tokens 9", "num_prefix_tokens=9, .*_tokens=6 "),
    (
        PREFIX,
        "prefix_tuning",
        "--prefix_projection --prefix_projection_hidden_size 9",
        "hidden_size=9, .*encoder_hidden_size=32 ",
    ),
]


@pytest.mark.parametrize("resumes", [False, True], ids=["start", "resume"])
@pytest.mark.parametrize(("content", "mode", "flag", "message"), CONTRADICTIONS)
def test_a_flag_that_the_adapter_contradicts(content, mode, flag, message, resumes, plan, tmp_path):
    if resumes:
        write_checkpoint(tmp_path, content)
        start = ["--resume_from_checkpoint", "true"]
    else:
        path = write_adapter(tmp_path / "adapter", content)
        start = ["--lora_path" if mode == "lora" else "--prefix_path", path]
    with pytest.raises(UserError, match=message + ".*drop the flag"):
        plan(f"--{mode}", *start, *flag.split())


def test_what_no_flag_says_is_the_adapters(plan, tmp_path):
    path = write_adapter(tmp_path / "adapter", LORA)
    _, found = plan("--lora", "--lora_path", path, "--target_modules", "v_proj", "q_proj")
    assert (found.lora_rank, found.lora_alpha) == (4, 8)
    assert found.lora_target_modules == ["v_proj", "q_proj"], "the same set"
    path = write_adapter(tmp_path / "adapter", LORA | {"target_modules": "all-linear"})
    _, found = plan("--lora", "--lora_path", path)
    assert found.lora_target_modules == ["all-linear"]
    path = write_adapter(tmp_path / "prefix", PREFIX)
    planned, found = plan("--prefix_tuning", "--prefix_path", path)
    assert planned.adapter == path
    assert (found.num_prefix_tokens, found.prefix_projection_hidden_size) == (6, 32)


def test_a_pissa_adapter_goes_on_as_it_was_trained(plan, tmp_path):
    """Its files hold a plain adapter of twice the rank, and beside it what that came from."""
    path = write_adapter(tmp_path / "adapter", LORA | {"r": 8, "use_dora": True})
    trained = LORA | {"init_lora_weights": "pissa_niter_5", "use_dora": True}
    (path / "pissa.json").write_text(json.dumps(trained | {"modules_to_save": ["norm"]}))
    _, found = plan("--lora", "--lora_path", path)
    assert (found.lora_rank, found.pissa, found.pissa_iter) == (4, True, 5)
    assert found.use_dora and found.modules_to_save == ["norm"]
    plan("--lora", "--lora_path", path, "--pissa", "--lora_rank", 4, "--modules_to_save", "norm")
    with pytest.raises(UserError, match=r"lora_rank=8, .* r=4 "):
        plan("--lora", "--lora_path", path, "--lora_rank", 8)


NEW = [
    ("--modules_to_save lm", "modules_to_save: this model has no layer lm; it has down_proj"),
    ("--pissa --pissa_iter 0", "pissa_iter=0 finds no principal part; give iterations, or -1"),
    ("--neftune false --neftune_noise_alpha 3", "neftune=false, and neftune_noise_alpha=3 has no"),
]


@pytest.mark.parametrize(("flags", "message"), NEW)
def test_what_cannot_be_trained_so(flags, message, plan):
    with pytest.raises(UserError, match=message):
        plan("--lora", *flags.split())


def test_how_a_new_adapter_is_trained(plan):
    planned, found = plan("--lora", "--pissa", "--additional_target", "lm_head,norm")
    assert found.modules_to_save == ["lm_head", "norm"]
    assert found.init_lora_weights == "pissa_niter_16"
    assert any("memory is not predicted" in line for line in planned.messages)
    assert plan("--lora", "--pissa", "--pissa_iter", "-1")[1].init_lora_weights == "pissa"
    strengths = [
        plan("--lora", *words.split())[1].noise_alpha
        for words in (
            "",
            "--neftune",
            "--neftune_noise_alpha 3",
            "--neftune --neftune_noise_alpha 3",
        )
    ]
    assert strengths == [None, 5.0, 3.0, 3.0]


def test_a_resumed_run_says_nothing_of_settings_that_the_adapter_has(plan, tmp_path):
    write_checkpoint(tmp_path, LORA, config={"lora_rank": 8, "weight_decay": 0.5})
    planned, found = plan("--lora", "--resume_from_checkpoint", "true", "--ignore_data_skip")
    changed = next(message for message in planned.messages if "settings changed" in message)
    assert found.lora_rank == 4 and "lora_rank" not in changed
    assert "weight_decay 0.5 -> 0.0" in changed


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (LORA, "--prefix_tuning", "mode lora, .* prefix; add --lora true and drop --prefix_tun"),
        (PREFIX, "--lora", "mode prefix, .* lora; add --prefix_tuning true and drop --lora"),
        (LORA, "", "mode lora, .* full; add --lora true, or start anew"),
        (None, "--lora", "mode full, .* lora; drop the other mode's flags"),
    ],
)
def test_another_mode_than_the_checkpoints(content, flags, message, plan, tmp_path):
    write_checkpoint(tmp_path, content)
    resume = ["--resume_from_checkpoint", "true", "--ignore_data_skip"]
    with pytest.raises(UserError, match=message):
        plan(*flags.split(), *resume)
    if content is not None:  # what the message says to do works
        mode = {"LORA": "--lora", "PREFIX_TUNING": "--prefix_tuning"}[content["peft_type"]]
        assert plan(mode, *resume)[0].resume is not None


def test_an_adapters_base_has_to_be_the_one_before(plan, tmp_path):
    base = as_json(load_config(TINY))
    resume = ["--lora", "--resume_from_checkpoint", "true", "--ignore_data_skip"]
    write_checkpoint(tmp_path, LORA, base=base)
    assert plan(*resume)[0].data_state["base_model"] == base
    write_checkpoint(tmp_path, LORA, base=base | {"rope_theta": 5.0})
    with pytest.raises(UserError, match=r"rope_theta: 5\.0 there, 10000\.0 here"):
        plan(*resume)


def test_an_adapter_of_the_other_kind_names_its_flag(plan, tmp_path):
    path = write_adapter(tmp_path / "adapter", PREFIX)
    with pytest.raises(UserError, match="give it as --prefix_path"):
        plan("--lora", "--lora_path", path)
