"""What a pretraining run refuses before paddle is imported, and what it says."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from common.errors import DataError, UserError
from common.flags import load, save_resolved
from data.corpus.token_store_writer import TokenStoreWriter
from data.tokenizer import load_tokenizer
from llm.config.scripts import SCRIPTS
from llm.llama.config import load_config
from llm.parallel.topology import single
from llm.planner.__main__ import read_recipe
from llm.runtime import process_threads
from llm.train import checkpoints, checks
from llm.train.checkpoints import Place, order_fingerprint
from llm.train.checks import claim_output_dir
from llm.train.pretrain_plan import plan_run
from llm.train.saver import Saver

TINY = "__internal_testing__/tiny-random-llama"
GROUPS = SCRIPTS["run_pretrain.py"]


def write_store(prefix, *, documents=60, length=50, top=1000, layout="bin", meta=None):
    """Write a store of rising numbers; ids stay below ``top``."""
    with TokenStoreWriter(prefix, np.uint16, layout=layout, meta=meta) as writer:
        for number in range(documents):
            writer.add_document((np.arange(length) * 97 + number) % top)
    return prefix


@pytest.fixture
def place(tmp_path):
    """A working directory with one good store in ``data``."""
    write_store(tmp_path / "data" / "corpus")
    return tmp_path


def groups(place, *words, **changes):
    flags = {
        "model_name_or_path": TINY,
        "input_dir": place / "data",
        "output_dir": place / "out",
        "max_seq_length": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "do_train": "true",
    }
    for name, value in changes.items():
        flags.pop(name, None)
        if value is not None:
            flags[name] = value
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return load(GROUPS, [*argv, *words], prog="run_pretrain.py")


def plan(place, *words, **changes):
    return plan_run(*groups(place, *words, **changes))


def make_checkpoint(place, step=2, config=TINY, **changes):
    """Write what a run of the same flags saves after ``step`` updates, without the tensors."""
    arguments = groups(place, **changes)
    done = plan_run(*groups(place, **changes))
    consumed = step * arguments[-1].samples_per_step

    def fill(directory, _):
        config_json = load_config(config).to_hf()
        (directory / "config.json").write_text(json.dumps(config_json))
        (directory / "model.safetensors").touch()
        save_resolved(arguments, directory / checkpoints.RESOLVED_CONFIG)
        order = order_fingerprint(done.datasets["train"], consumed)
        state = {"consumed_samples": consumed, "order": order, **done.data_state}
        checkpoints.write_json(directory / checkpoints.LOADER_STATE, state)
        length = {"max_steps": done.max_steps}
        checkpoints.write_json(directory / checkpoints.TRAINER_STATE, length)

    Saver(place / "out").save(step, fill)
    return place / "out" / f"checkpoint-{step}"


def test_a_good_run_is_planned_without_paddle(place):
    planned = plan(place, do_eval="true", tokenizer_name_or_path=TINY)
    assert planned.max_steps == 4 and planned.resume is None and planned.weights is None
    assert len(planned.datasets["train"]) >= 8 and len(planned.datasets["eval"]) >= 1
    assert planned.datasets["test"] is None
    assert planned.tokenizer.vocab_size <= planned.config.vocab_size
    assert planned.data_state["num_documents"] == 60


def damage(change):
    """Return a preparation step that changes the good working directory."""

    def apply(place):
        change(place)
        return {}

    return apply


def high_ids(place):
    write_store(place / "high" / "corpus", top=5000)
    return {"input_dir": place / "high"}


def foreign_store(place):
    meta = {"tokenizer_fingerprint": "f" * 64, "tokenizer": "another"}
    write_store(place / "foreign" / "corpus", meta=meta)
    return {"input_dir": place / "foreign", "tokenizer_name_or_path": TINY}


def occupied(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").touch()
    return {}


def file_in_the_way(place):
    (place / "file").touch()
    return {"output_dir": place / "file" / "out"}


def model_without_weights(place):
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps(load_config(TINY).to_hf()))
    return {"model_name_or_path": place / "model", "continue_training": "true"}


def model_inside_output(place):
    flags = model_without_weights(place)
    shutil.move(place / "model", place / "out" / "model")
    inside = {"model_name_or_path": place / "out" / "model", "overwrite_output_dir": "true"}
    return flags | inside


def small_model(place):
    raw = load_config(TINY).replace(vocab_size=512).to_hf()
    (place / "small").mkdir()
    (place / "small" / "config.json").write_text(json.dumps(raw))
    return {"model_name_or_path": place / "small", "tokenizer_name_or_path": TINY}


def truncate(name, size):
    def change(place):
        path = place / "data" / name
        path.write_bytes(path.read_bytes()[:size])

    return damage(change)


# what is prepared, what the flags are, what the message says
BAD = {
    "no input": ({"input_dir": None}, "input_dir is missing: give a token store"),
    "no model": ({"model_name_or_path": None}, "model_name_or_path is missing"),
    "unknown model": ({"model_name_or_path": "llama-9b"}, "neither a directory nor a built-in"),
    "no such store": ({"input_dir": "nowhere/x"}, "no token store at nowhere/x"),
    "empty directory": ({"input_dir": "."}, r"input_dir=\. has no token store in it"),
    "a weight alone": ({"input_dir": "0.3 data 0.7"}, "after the weight 0.7 has to come a store"),
    "a store twice": ({"input_dir": "1 data 1 data/corpus"}, "input_dir names data/corpus twice"),
    "no validation stores": (
        {"test_data_path": "data", "do_eval": "true"},
        "do_eval needs --valid_data_path beside test_data_path",
    ),
    "validation stores are none": ({"valid_data_path": "nowhere/x"}, "no token store at nowhere/x"),
    "validation ids too high": (
        lambda place: {"valid_data_path": high_ids(place)["input_dir"]},
        "holds token id 4[0-9]+, but the model's vocabulary has 1024 ids",
    ),
    "a split beside stores": (
        {"test_data_path": "data", "split": "9,1"},
        "split has no effect beside valid_data_path or test_data_path",
    ),
    "too many tokens to warm up": ({"warmup_tokens": 128}, "warmup_steps=4 has to be below"),
    "two warm-ups": (
        {"warmup_tokens": 9, "warmup_steps": 1},
        "warmup_steps has no effect beside warmup_tokens; drop one",
    ),
    "two decays": (
        {"decay_tokens": 9, "decay_steps": 1},
        "decay_steps has no effect beside decay_tokens; drop one",
    ),
    "index cut off": (truncate("corpus.idx", 40), "corpus.idx is cut off"),
    "tokens cut off": (truncate("corpus.bin", 99), r"corpus.bin has 99 bytes"),
    "not an index": (
        damage(lambda place: (place / "data" / "corpus.idx").write_bytes(b"x" * 100)),
        "is no index of a token store",
    ),
    "half a store": (
        damage(lambda place: (place / "data" / "corpus.bin").unlink()),
        r"corpus.idx is there but .*corpus.bin is not",
    ),
    "ids too high": (high_ids, "holds token id 4[0-9]+, but the model's vocabulary has 1024 ids"),
    "another tokenizer's ids": (foreign_store, "was made with another tokenizer"),
    "tokenizer too large": (small_model, "has 1024 tokens, the model's vocab_size is 512"),
    "no such tokenizer": ({"tokenizer_name_or_path": "nowhere"}, "no tokenizer at nowhere"),
    "split is text": ({"split": "most,few"}, "split must be one to three numbers"),
    "split is negative": ({"split": "9,-1,1"}, "no negative share"),
    "no validation part": (
        {"split": "100,0,0", "do_eval": "true"},
        "the valid part .* is empty: split 100,0,0",
    ),
    "no test part": ({"split": "99,1,0", "do_predict": "true"}, "the test part .* is empty"),
    "part too short": (
        {"split": "10,89,1", "max_seq_length": 500},
        "the train part .* has 300 tokens .* one sample takes 501",
    ),
    "sequence too long": ({"max_seq_length": 4096}, "exceeds the model's max_position_embeddings"),
    "warm-up too long": ({"warmup_steps": 4}, "warmup_steps=4 has to be below max_steps=4"),
    "minimum above peak": ({"min_lr": 1}, "min_learning_rate=1.0 exceeds learning_rate"),
    "no length": ({"max_steps": None}, "training needs --max_steps or --train_tokens"),
    "two lengths": ({"train_tokens": 100}, "max_steps and train_tokens are both set"),
    "nothing to do": ({"do_train": None}, "do_train is off; add --do_train"),
    "zero steps": ({"max_steps": 0, "train_tokens": 9}, "max_steps=0: give a positive number"),
    "batch of zero": ({"per_device_train_batch_size": 0}, "but the minimum is 1"),
    "not a number": ({"learning_rate": "fast"}, "learning_rate='fast' is not a valid float"),
    "nan": ({"learning_rate": "nan"}, "learning_rate='nan' is not a valid float"),
    "output occupied": (occupied, "is not empty; start over with --overwrite_output_dir true"),
    "output is below a file": (file_in_the_way, "is a file; give a directory"),
    "no weights": (model_without_weights, r"has no model\*.safetensors"),
    "a shape has no weights": (
        {"model_name_or_path": "llama-3.2-1b", "continue_training": "true"},
        "llama-3.2-1b is only a shape: give a model directory",
    ),
    "would delete its model": (model_inside_output, "would delete the model to start from"),
    "too large for the machine": (
        {"model_name_or_path": "llama-3.1-405b"},
        r"needs \d+ GB for weights, gradients and moments alone",
    ),
    "nothing to resume": ({"resume_from_checkpoint": "true"}, "no complete checkpoint in"),
    "resume from nowhere": ({"resume_from_checkpoint": "x"}, "x is not a directory"),
    "unknown flag": ({"max_step": 3}, "unknown 'max_step'; did you mean 'max_steps'"),
    "fp16 on a CPU": ({"fp16": "true"}, "fp16 needs a GPU"),
    "unknown word of the pipeline": (
        {"pipeline_parallel_config": "disable_p2p_cache"},
        "did you mean 'disable_p2p_cache_shape'",
    ),
    "recomputes too much": (
        {"recompute": "true", "recompute_num_layers": 3},
        "recompute_num_layers=3 exceeds the model's 2 layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(case, place, monkeypatch):
    prepare, message = BAD[case]
    monkeypatch.chdir(place)
    (place / "out").mkdir(exist_ok=True)
    if prepare is occupied or prepare is model_without_weights:
        (place / "out").rmdir()
    flags = prepare(place) if callable(prepare) else prepare
    before = sorted(str(path) for path in place.rglob("*") if "index-cache" not in path.parts)
    with pytest.raises(UserError, match=message) as caught:
        plan(place, **flags)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    after = sorted(str(path) for path in place.rglob("*") if "index-cache" not in path.parts)
    assert after == before


def test_tensorboard_names_the_package_to_install(place, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        plan(place, report_to="tensorboard")


def test_the_layout_is_checked_against_model_and_batches(place, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    with pytest.raises(UserError, match="does not divide the model's num_key_value_heads"):
        plan(place, tensor_parallel_degree=4)
    said = plan(place, tensor_parallel_degree=2, pipeline_parallel_degree=2).messages
    assert any("layout: tensor 2 x pipeline 2" in line for line in said)
    assert any("stages wait 50%" in line for line in said)


def test_threads_ignore_the_launchers_one(monkeypatch):
    assert process_threads(None) is None
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert process_threads(None) >= 1
    assert process_threads(3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user's choice
    assert process_threads(None) is None


@pytest.mark.parametrize("name", ["corpus.bin", "corpus"])
def test_a_store_is_found_by_prefix_only(name, place):
    wanted = place / "data" / name
    if name == "corpus":
        assert plan(place, input_dir=wanted).data_state["num_tokens"] == 3000
    else:
        with pytest.raises(DataError, match="no token store at"):
            plan(place, input_dir=wanted)


def test_overwriting_clears_the_old_run_but_not_foreign_files(place):
    make_checkpoint(place)
    (place / "out" / "thesis.tex").touch()
    planned = plan(place, overwrite_output_dir="true")
    assert (place / "out" / "checkpoint-2").is_dir()  # planning changes nothing
    claim_output_dir(groups(place, overwrite_output_dir="true")[-1], planned, single())
    assert [path.name for path in (place / "out").iterdir()] == ["thesis.tex"]


def test_a_checkpoint_from_elsewhere_needs_a_free_output_directory(place):
    checkpoint = make_checkpoint(place)
    (place / "new").mkdir()
    flags = {"resume_from_checkpoint": checkpoint, "output_dir": place / "new"}
    assert plan(place, **flags).resume.path == checkpoint
    (place / "new" / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match=r"output_dir=.*new is not empty"):
        plan(place, **flags)
    planned = plan(place, overwrite_output_dir="true", **flags)
    claim_output_dir(groups(place, overwrite_output_dir="true", **flags)[-1], planned, single())
    assert list((place / "new").iterdir()) == [] and checkpoint.is_dir()


def test_the_summary_counts_what_the_run_takes(place):
    summary = plan(place).messages[-1]
    assert "model: 0.22 million parameters" in summary
    assert "60 documents, 3,000 tokens" in summary
    assert "4 updates of 32 tokens, 128 in all, 1 pass over" in summary


def test_resuming_plans_from_the_newest_checkpoint(place):
    make_checkpoint(place, 2)
    newest = make_checkpoint(place, 3, resume_from_checkpoint="true")
    planned = plan(place, resume_from_checkpoint="true", learning_rate=0.002)
    assert planned.resume.path == newest and planned.weights == newest
    text = "; ".join(planned.messages)
    assert "after step 3" in text and "learning_rate 5e-05 -> 0.002" in text
    assert "logging" not in text


RESUME = {
    "split": ({"split": "90,5,5"}, "split was 949,50,1, now it is 90,5,5; restore it, or"),
    "seed": ({"seed": 7}, "seed was 42, now it is 7"),
    "length": ({"max_seq_length": 8}, "max_seq_length was 16, now it is 8"),
    "too short": ({"max_steps": 1}, "has done 2 steps already, max_steps is 1"),
    "model": ({"model_name_or_path": "tiny-llama-3.2"}, "holds another model than model_name"),
}


@pytest.mark.parametrize("case", RESUME)
def test_resuming_with_other_data_or_model_is_refused(case, place):
    make_checkpoint(place)
    changes, message = RESUME[case]
    with pytest.raises(UserError, match=message):
        plan(place, resume_from_checkpoint="true", **changes)
    if case in ("split", "seed", "length"):
        plan(place, resume_from_checkpoint="true", ignore_data_skip="true", **changes)


def taken(planned, start, stop):
    return [planned.datasets["train"][n]["input_ids"].tolist() for n in range(start, stop)]


def test_a_run_is_extended_past_its_passes(place):
    first = plan(place)
    make_checkpoint(place)
    count = 8
    longer = plan(place, resume_from_checkpoint="true", max_steps=400)
    assert taken(longer, 0, count) == taken(first, 0, count), "what was laid out stays"
    assert longer.data_state[checks.LAID_OUT] == [8, 792] and len(longer.datasets["train"]) == 800
    seen = {tuple(ids) for ids in taken(longer, 8, 800)}
    assert len(seen) > 150, "whole passes follow"
    text = "; ".join(longer.messages)
    assert "the run takes 792 samples more than before" in text
    assert "the learning rate changes here: update 3 takes 4.98e-05" in text
    assert "had 2.5e-05" in text


def test_an_extended_run_goes_on_exactly_and_may_be_extended_again(place):
    make_checkpoint(place)
    newest = make_checkpoint(place, 300, resume_from_checkpoint="true", max_steps=400)
    longer = plan(place, resume_from_checkpoint="true", max_steps=500)
    assert longer.resume.path == newest and longer.data_state[checks.LAID_OUT] == [8, 792, 200]
    before = plan(place, resume_from_checkpoint=newest, max_steps=400)
    assert taken(before, 0, 800) == taken(longer, 0, 800)
    shorter = plan(place, resume_from_checkpoint="true", max_steps=350)
    assert taken(shorter, 0, 700) == taken(longer, 0, 700)


def test_a_rate_that_stays_is_not_mentioned(place):
    make_checkpoint(place)
    planned = plan(place, resume_from_checkpoint="true", max_steps=5)
    assert any("the learning rate changes" in message for message in planned.messages)
    planned = plan(place, resume_from_checkpoint="true")
    assert not any("the learning rate changes" in message for message in planned.messages)


def test_a_runs_own_file_begins_it_anew(place, tmp_path):
    make_checkpoint(place)
    resumed = groups(place, resume_from_checkpoint="true", ignore_data_skip="true")
    checks.save_settings(resumed, tmp_path)
    file = tmp_path / checkpoints.RESOLVED_CONFIG
    assert not {"resume_from_checkpoint", "ignore_data_skip"} & set(file.read_text().split(":"))
    anew = load(GROUPS, [str(file)], prog="test")
    assert anew[-1].resume_from_checkpoint is None
    with pytest.raises(UserError, match="is not empty; continue with --resume_from_checkpoint"):
        plan_run(*anew)
    assert plan_run(*load(GROUPS, [str(file), "--resume_from_checkpoint", "true"], prog="t")).resume


def test_a_device_that_was_found_and_one_that_is_named_are_the_same(place):
    make_checkpoint(place, device="cpu")
    planned = plan(place, resume_from_checkpoint="true", device="auto")
    assert not any("settings changed" in message for message in planned.messages)


def test_resuming_with_another_batch_goes_on_at_the_next_sample(place):
    make_checkpoint(place)
    planned = plan(place, resume_from_checkpoint="true", per_device_train_batch_size=3)
    assert planned.start == Place(2, 4)
    # Two updates of two samples are done, two of three are to come.
    assert planned.start.sample_at(planned.max_steps, 3) == 10 <= len(planned.datasets["train"])
    said = "; ".join(planned.messages)
    assert "an update took 2 samples, now it takes 3: going on at sample 4, none twice" in said
    tokens = {"train_tokens": 10 * 16, "max_steps": -1}
    again = plan(place, resume_from_checkpoint="true", per_device_train_batch_size=3, **tokens)
    assert again.max_steps == 4
    over = plan(place, resume_from_checkpoint="true", ignore_data_skip="true")
    assert over.start == Place(2, 0)


def test_resuming_on_another_store_is_refused(place):
    make_checkpoint(place)
    write_store(place / "new" / "corpus", top=999)
    with pytest.raises(UserError, match=r"store was [0-9a-f]{64}, now it is"):
        plan(place, resume_from_checkpoint="true", input_dir=place / "new")


def test_trading_batch_for_accumulation_resumes(place):
    make_checkpoint(place)
    planned = plan(
        place,
        resume_from_checkpoint="true",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    assert planned.resume.step == 2


def test_a_longer_run_resumes_where_the_order_stays(place):
    make_checkpoint(place)
    planned = plan(place, resume_from_checkpoint="true", max_steps=5)
    assert planned.max_steps == 5
    assert any("max_steps 4 -> 5" in message for message in planned.messages)


def trained_model(place):
    (place / "model").mkdir()
    raw = load_config(TINY).replace(num_hidden_layers=1).to_hf()
    (place / "model" / "config.json").write_text(json.dumps(raw))
    (place / "model" / "model.safetensors").touch()
    load_tokenizer(TINY).save(place / "model")
    return place / "model"


def test_every_flag_of_model_and_data_has_an_effect(place):
    model = trained_model(place)
    planned = plan(place, model_name_or_path=model)
    assert planned.config.num_hidden_layers == 1 and planned.weights is None
    assert planned.tokenizer is not None  # found in the model's directory
    assert plan(place).tokenizer is None
    assert plan(place, tokenizer_name_or_path=model).tokenizer is not None
    assert plan(place, model_name_or_path=model, continue_training="1").weights == model
    with pytest.raises(UserError, match="model_type='gpt' is not one of llama"):
        groups(place, model_type="gpt")
    shorter = plan(place, max_seq_length=8).datasets["train"]
    assert shorter[0]["input_ids"].shape == (8,)
    assert len(shorter) != len(plan(place, split="50,40,10", max_seq_length=8).datasets["train"])
    write_store(place / "other" / "corpus", documents=30)
    elsewhere = plan(place, input_dir=place / "other", data_cache=place / "cache")
    assert elsewhere.data_state["num_documents"] == 30
    assert any((place / "cache").iterdir()) and not (place / "other" / "index-cache").exists()


@pytest.fixture
def network(place):
    """Build the network that the script builds for some flags."""
    from run_pretrain import _network

    return lambda **flags: _network(plan(place), *groups(place, **flags)[::2], single())


def test_kernels_and_recomputation_follow_their_flags(network):
    import paddle

    from external_ops import flash_attention, rms_norm

    plain = network(use_fused_rms_norm="false", use_flash_attention="false")
    assert plain.ops.rms_norm is rms_norm.rms_norm_ref
    assert plain.ops.causal_attention is flash_attention.causal_attention_ref
    fused = network(use_fused_rms_norm="true", use_flash_attention="true")
    assert fused.ops.rms_norm is not plain.ops.rms_norm
    assert fused.ops.causal_attention is not plain.ops.causal_attention
    assert network().ops == fused.ops

    def forwards(model):
        """Count layer calls of one training step."""
        calls = []
        for layer in model.model.layers:
            layer.register_forward_post_hook(lambda *_: calls.append(1))
        model.train()
        model(paddle.to_tensor([[1, 2, 3]])).sum().backward()
        return len(calls)

    assert forwards(plain) == 2 and forwards(network(recompute="true")) == 4


def test_resolved_config_loads_again(place, tmp_path):
    arguments = groups(place)
    save_resolved(arguments, tmp_path / "resolved.yaml")
    assert load(GROUPS, [str(tmp_path / "resolved.yaml")], prog="test") == arguments


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "configs").glob("pretrain_*.yaml")), ids=str
)
def test_recipes_parse_and_name_only_what_exists(path, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(read_recipe([str(path)]).layout.world_size))
    model, data, run = load(GROUPS, [str(path)], prog="run_pretrain.py")
    assert run.do_train and run.total_steps(data.max_seq_length) > 0
    assert set(yaml.safe_load(path.read_text())) <= {
        field.name for group in GROUPS for field in dataclasses.fields(group)
    }
    if not model.model_name_or_path.startswith("."):
        config = load_config(model.model_name_or_path)
        assert data.max_seq_length <= config.max_position_embeddings
