"""What a finetuning run refuses before paddle is imported, and what it plans."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UserError
from common.flags import load
from data.conversations.instruct import read_examples
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import write_instruct_store
from data.conversations.tasks import SAMPLES
from data.tokenizer import load_tokenizer
from llm.config.finetune import AdaptationArguments
from llm.config.scripts import SCRIPTS
from llm.llama.config import PRESETS, TINY_NAME, load_config
from llm.parallel.layout import Layout
from llm.planner.__main__ import read_recipe
from llm.train.finetune_plan import plan_finetune
from llm.train.frozen_base import plan_base

TINY = "__internal_testing__/tiny-random-llama"


def write_examples(path, count=10, **changes):
    """Write {src, tgt} lines; ``changes`` replace the last one."""
    lines = [{"src": f"Say {n}.", "tgt": f"It is {n}."} for n in range(count)]
    lines[-1] |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def place(tmp_path):
    """A directory with a train and a dev file."""
    write_examples(tmp_path / "data" / "train.jsonl")
    write_examples(tmp_path / "data" / "dev.jsonl", 4)
    return tmp_path


def groups(place, **changes):
    flags = {
        "model_name_or_path": TINY,
        "dataset_path": place / "data",
        "output_dir": place / "out",
        "do_train": "true",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
    }
    for name, value in changes.items():
        flags.pop(name, None)
        if value is not None:
            flags[name] = value
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return load(GROUPS, words, prog="finetune_generation.py")


def plan(place, **changes):
    return plan_finetune(groups(place, **changes))


def test_a_good_run_is_planned_without_paddle(place):
    planned = plan(place, do_eval="true", src_length=30)
    assert planned.base == TINY and planned.adapter is None and planned.resume is None
    assert planned.max_steps == math.ceil(20 / 4) and planned.epoch_ends == {3, 5}
    assert len(planned.datasets["train"]) == 20 and len(planned.datasets["eval"]) == 4
    assert planned.tokenizer.chat_template is not None
    assert "5 updates of 4 samples, 2.00 passes" in planned.messages[-1]


def test_counts_are_those_of_the_samples(place):
    planned = plan(place, num_train_epochs=1.5)
    stream = planned.datasets["train"]
    for start, stop in ((0, 4), (4, 8), (8, 16)):
        samples = [stream[index] for index in range(start, stop)]
        counts = planned.count(start, stop)
        assert counts.tokens == sum(len(sample["input_ids"]) for sample in samples)
        assert counts.weight == sum((sample["labels"] >= 0).sum() for sample in samples)


def test_each_pass_takes_each_sample_once(place):
    planned = plan(place, num_train_epochs=3)
    stream = planned.datasets["train"]
    for start in (0, 10, 20):
        assert sorted(stream.index(k) for k in range(start, start + 10)) == list(range(10))


def test_a_share_of_one_file_is_kept_for_evaluation(place):
    only = write_examples(place / "one.jsonl", 20)
    planned = plan(place, dataset_path=only, dev_ratio=0.2, do_eval="true")
    assert len(planned.parts["train"]) == 16 and len(planned.parts["eval"]) == 4
    assert planned.parts["eval"].answers(3) == ("It is 19.",)


def test_a_prepared_store_gives_the_same_samples(place):
    tokenizer = load_tokenizer(TINY, chat_template="plain")
    for part in ("train", "dev"):
        examples = read_examples([place / "data" / f"{part}.jsonl"])
        made = InstructDataset.from_examples(examples, tokenizer)
        write_instruct_store(place / "store" / part, made, Limits())
    flags = {"chat_template": "plain", "do_eval": "true"}
    raw, stored = plan(place, **flags), plan(place, dataset_path=place / "store", **flags)
    assert raw.data_state == stored.data_state
    for k in range(20):
        for name, value in raw.datasets["train"][k].items():
            assert np.array_equal(value, stored.datasets["train"][k][name])


def test_bad_examples_are_skipped_on_demand(place, caplog):
    train = place / "data" / "train.jsonl"
    before = plan(place).data_state["data"]
    train.write_text(train.read_text() + '{"src": "q", "tgt": ""}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:\d+: the answer is empty"):
        plan(place)
    assert plan(place, on_bad_example="skip").data_state["data"] == before
    assert "left out 1 bad records" in caplog.text and "the answer is empty" in caplog.text


def test_bad_pairs_are_skipped_on_demand(place, caplog):
    pairs = [{"prompt": f"p{k}", "chosen": "a", "rejected": "ab"[k > 0]} for k in range(9)]
    path = place / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = {"dataset_path": path, "task_name": "preference", "dpo": "true"}
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: chosen and rejected are the same"):
        plan(place, **flags)
    assert len(plan(place, on_bad_example="skip", **flags).parts["train"]) == 8
    assert "left out 1 bad records" in caplog.text and "pairs.jsonl:1" in caplog.text


def test_pairs_of_a_file_need_no_task_name(place):
    pairs = [{"prompt": f"p{k}", "chosen": "a", "rejected": "b"} for k in range(9)]
    path = place / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    named = plan(place, dataset_path=path, dpo="true", task_name="preference")
    assert plan(place, dataset_path=path, dpo="true").data_state == named.data_state
    assert len(plan(place, dataset_path=path, dpo="true", max_samples=4).parts["train"]) == 4


def test_another_file_to_evaluate_on_and_the_first_examples(place):
    other = write_examples(place / "other.jsonl", 7)
    planned = plan(place, dev_dataset_path=other, do_eval="true", max_samples=5)
    assert (len(planned.parts["train"]), len(planned.parts["eval"])) == (5, 5)
    assert planned.parts["eval"].answers(4) == ("It is 4.",)
    assert planned.parts["train"].fingerprint() != plan(place).parts["train"].fingerprint()


def test_a_length_of_both_counts_for_rows_and_examples(place):
    words = {"max_length": 60, "src_length": 40}
    assert plan(place, **words).data_state["data"] == plan(place).data_state["data"]
    packed = plan(place, packing="true", **words)
    assert packed.data_state["row_length"] == 60
    with pytest.raises(UserError, match="above max_length=3"):
        plan(place, max_length=3, src_length=2)
    with pytest.raises(UserError, match="max_length=40 leaves no room for answers"):
        plan(place, max_length=40, src_length=40)


def test_the_summary_counts_both_sides_of_pairs(place):
    pairs = [{"prompt": f"q {n}", "chosen": "a long answer", "rejected": "no"} for n in range(6)]
    path = place / "sides.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    planned = plan(place, dataset_path=path, task_name="preference", dpo="true")
    part = planned.train
    sides = [part.chosen, part.rejected]
    tokens = sum(len(side[n]["input_ids"]) for side in sides for n in range(len(part)))
    labels = sum((side[n]["labels"] >= 0).sum() for side in sides for n in range(len(part)))
    assert labels < tokens
    assert f"{tokens:,} tokens, {labels:,} of them to be learnt" in planned.messages[-1]
    samples = planned.datasets["train"]
    whole = sum(len(samples[n][f"{side}_ids"]) for n in range(4) for side in ("chosen", "rejected"))
    assert planned.count(0, 4).tokens == whole


def test_memory_is_predicted_for_what_a_batch_holds(place):
    """Rows of the longest sample, labels of those with most; nothing where weights are rounded."""
    planned = plan(place, do_eval="true", per_device_train_batch_size=3)
    work, part = planned.prediction.work, planned.parts
    rows = [part["train"][n] for n in range(len(part["train"]))]
    longest = max(len(row["input_ids"]) for row in rows)
    assert longest <= work.seq_length < longest + 8 and work.seq_length % 8 == 0
    counts = sorted((row["labels"] >= 0).sum() for row in rows)
    assert work.scored == sum(counts[-3:]) < 3 * longest
    assert work.eval_batch and work.eval_scored == part["eval"].label_counts.sum()
    assert any("predicted memory: at most" in message for message in planned.messages)
    few = plan(place, per_device_train_batch_size=500)
    assert few.prediction.work.scored == sum(counts)
    rounded = plan(place, qat="true", qat_type="A8W8")
    assert rounded.prediction is None
    assert any("memory is not predicted" in message for message in rounded.messages)


def test_packing_keeps_every_label(place):
    plain, packed = plan(place), plan(place, packing="true", max_seq_length=64)
    assert len(packed.train) < len(plain.train)
    assert packed.train.label_counts.sum() == plain.train.label_counts.sum()
    assert any("examples in" in message and "% full" in message for message in packed.messages)


def test_half_precision_is_announced_as_unused_on_a_cpu(place):
    planned = plan(place, fp16="true", fp16_opt_level="O2")
    assert not planned.run.fp16
    assert planned.messages[0].startswith("fp16 is not used: Paddle has no fp16 kernels on CPU")


@pytest.mark.parametrize(("weight_type", "frozen"), [("float32", True), ("bfloat16", False)])
def test_at_o2_a_base_lies_as_the_network_computes(weight_type, frozen):
    run = SimpleNamespace(weight_type=weight_type, layout=Layout())
    base = plan_base(TINY_NAME, AdaptationArguments(lora=True), run, PRESETS["tiny-random-llama"])
    assert base.options == {"dtype": weight_type, "frozen": frozen, "round_to": None}
    assert not base.unusual


def test_the_sample_of_a_task_says_that_it_is_one(place):
    planned = plan(place, dataset_path=None, task_name="squad")
    assert any("the small sample that comes with the suite" in m for m in planned.messages)
    assert "nothing between them" in " ".join(planned.messages) or planned.tokenizer.chat_template


def text_store(place):
    from data.corpus.token_store_writer import TokenStoreWriter

    with TokenStoreWriter(place / "text" / "train", np.uint16) as writer:
        writer.add_document(np.arange(50))
    return {"dataset_path": place / "text"}


def without_weights(place):
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps(load_config(TINY).to_hf()))
    return {"model_name_or_path": place / "model"}


def adapter_as_model(place):
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    return {"model_name_or_path": place / "adapter"}


def no_tokenizer(place):
    flags = without_weights(place)
    (place / "model" / "model.safetensors").touch()
    return flags


def changed(**changes):
    def prepare(place):
        write_examples(place / "data" / "train.jsonl", **changes)
        return {}

    return prepare


def roleless(place):
    (place / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return {"chat_template": place / "t.jinja"}


def occupied(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").touch()
    return {}


FP8 = {"fp8": "true", "bf16": "true", "device": "gpu"}
BEST = {"load_best_model_at_end": "true", "do_eval": "true"}
EPOCH = {"evaluation_strategy": "epoch", "save_strategy": "epoch"}
BAD = {
    "no data": ({"dataset_path": None}, "no data: give --dataset_path"),
    "no such data": ({"dataset_path": "nowhere"}, "nothing is at dataset_path nowhere"),
    "unknown task": ({"dataset_path": None, "task_name": "squat"}, "did you mean squad"),
    "data without task": ({"data_name": "belle"}, "data_name=belle needs --task_name"),
    "no dev part": (
        lambda place: {"dataset_path": place / "data" / "train.jsonl", "do_eval": "true"},
        "has no dev part; put a dev file beside",
    ),
    "all kept back": (
        lambda place: {
            "dataset_path": write_examples(place / "one.jsonl", 1),
            "dev_ratio": 0.5,
        },
        "dev_ratio=0.5 of 1 examples leaves none to train on",
    ),
    "a share beside a dev file": (
        lambda place: {"dataset_path": place / "data", "dev_ratio": 0.5},
        "dev_ratio=0.5 keeps a share of the train file, but there is a dev file, .*dev.jsonl; drop",
    ),
    "text store": (text_store, "holds text for pretraining, not examples"),
    "store asked of files": (
        {"raw_data": "false"},
        "drop raw_data=false|one store is opened at a time",
    ),
    "empty answer": (changed(tgt=" "), r"train.jsonl:10: .*empty"),
    "no answer": (changed(tgt=None), r"train.jsonl:10: "),
    "long prompt": (
        lambda place: changed(src="word " * 60)(place) | {"src_length": 40},
        r"1 of 10 examples are too long: .*prompt above src_length=40.*train.jsonl:10",
    ),
    "long answer": (
        lambda place: changed(tgt="word " * 60)(place) | {"tgt_length": 20},
        r"answer above tgt_length=20, the longest of \d+ tokens",
    ),
    "template without roles": (roleless, "the chat template cannot be trained with"),
    "unknown template": ({"chat_template": "lama3"}, "lama3"),
    "no model": ({"model_name_or_path": None}, "model_name_or_path is missing"),
    "a shape only": ({"model_name_or_path": "llama-3.2-1b"}, "starts from weights"),
    "no weights": (without_weights, r"has no model\*.safetensors"),
    "no tokenizer": (no_tokenizer, "holds no tokenizer"),
    "adapter as model": (adapter_as_model, "is an adapter: give its base model there"),
    "rank 0": ({"lora": "true", "lora_rank": 0}, "lora_rank=0 but the minimum is 1"),
    "two modes": ({"lora": "true", "prefix_tuning": "true"}, "lora and prefix_tuning are both set"),
    "path without mode": ({"lora_path": "x"}, "lora_path is given but lora is off"),
    "no adapter there": ({"lora": "true", "lora_path": "x"}, "lora_path=x has no adapter_config"),
    "merge without lora": ({"merge_weights": "true"}, "merge_weights is given but lora is off"),
    "pairs without dpo": ({"dataset_path": None, "task_name": "preference"}, "add --dpo true"),
    "dpo without pairs": ({"dpo": "true", "task_name": "squad"}, "use --task_name preference"),
    "dpo packed": (
        {"dataset_path": None, "task_name": "preference", "dpo": "true", "packing": "true"},
        "packing does not work for pairs",
    ),
    "dpo generates": (
        {"dpo": "true", "eval_with_do_generation": "true", "do_eval": "true"},
        "eval_with_do_generation scores answers",
    ),
    "smoothing of hinge": (
        {"dpo": "true", "dpo_label_smoothing": 0.6},
        "dpo_label_smoothing=0.6 but the maximum is 0.49",
    ),
    "best of what": (BEST, "evaluation_strategy is not steps or epoch; choose that"),
    "strategies differ": (
        BEST | {"evaluation_strategy": "epoch", "save_strategy": "steps"},
        "evaluation_strategy=epoch and save_strategy=steps; make them equal",
    ),
    "saves between evaluations": (
        BEST | {"evaluation_strategy": "steps", "eval_steps": 2, "save_steps": 3},
        "save_steps=3 has to be a multiple of eval_steps=2",
    ),
    "unknown metric": (
        BEST | EPOCH | {"metric_for_best_model": "acuracy"},
        "acuracy is not measured; there are loss, perplexity, accuracy",
    ),
    "generated metric": (
        BEST | EPOCH | {"metric_for_best_model": "f1"},
        "add --eval_with_do_generation true",
    ),
    "generates unasked": ({"eval_with_do_generation": "true"}, "add --do_eval"),
    "test part": ({"do_predict": "true"}, "finetuning has no test part"),
    "prefix fills the context": (
        {"prefix_tuning": "true", "num_prefix_tokens": 2040},
        "a prefix of 2040 exceeds the model's max_position_embeddings=2048",
    ),
    "row too short": ({"packing": "true", "max_seq_length": 4}, "do not fit into a row of 4"),
    "warm-up too long": ({"warmup_steps": 5}, "warmup_steps=5 has to be below max_steps=5"),
    "output occupied": (occupied, "is not empty; start over with"),
    "unknown flag": ({"lora_ranks": 8}, "unknown 'lora_ranks'; did you mean 'lora_rank'"),
    "float8 on a CPU": (FP8 | {"device": "cpu"}, "Hopper GPUs, which device=cpu is not; drop"),
    "float8 of a small model": (FP8, "blocks of 128 x 128, and the model's hidden_size is 64"),
    "float8 beside LoRA": (
        FP8 | {"lora": "true"},
        "fp8 trains all weights of a plain network, not lora; drop one",
    ),
    "parallel": ({"tensor_parallel_degree": 4}, "takes a multiple of 4 processes, launched: 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(case, place, monkeypatch):
    prepare, message = BAD[case]
    monkeypatch.chdir(place)
    flags = prepare(place) if callable(prepare) else prepare
    before = sorted(str(path) for path in place.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        plan(place, **flags)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert sorted(str(path) for path in place.rglob("*")) == before


GROUPS = SCRIPTS["finetune_generation.py"]
CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted([*CONFIGS.glob("finetune_*"), *CONFIGS.glob("dpo_*"), CONFIGS / "demo_lora.yaml"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_plans(path, place, monkeypatch):
    """Models and data that a recipe only names are replaced by small ones."""
    assert len(RECIPES) == 7
    layout = read_recipe([str(path), "--model_name_or_path", TINY]).layout
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(layout.world_size))
    words = ["--model_name_or_path", TINY, "--output_dir", str(place / "out")]
    words += ["--src_length", "800", "--tgt_length", "800"]
    text = path.read_text()
    if "max_seq_length" in text:
        words += ["--max_seq_length", "1600"]
    if "task_name" in text:
        task = "preference" if "preference" in text else "squad"
        words += ["--dataset_path", str(SAMPLES / task)]
    else:
        words += ["--dataset_path", str(SAMPLES / "squad"), "--chat_template", "alpaca"]
    chosen = load(GROUPS, [str(path), *words], prog="finetune_generation.py")
    network, _, adaptation, _, run = chosen
    planned = plan_finetune(chosen)
    assert planned.max_steps > 0 and planned.datasets["eval"] is not None
    assert ("lora" in path.stem) == adaptation.lora and ("gpu" in path.stem) == run.bf16
    assert network.use_flash_attention or "tiny" in path.stem


def test_rounding_whole_matrices_is_refused_over_tensor_ranks(place, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(UserError, match="qat rounds whole matrices, of which each process of"):
        plan_finetune(groups(place, qat="true", tensor_parallel_degree=2))
    with pytest.raises(UserError, match="fp8 multiplies whole matrices, of which each process of"):
        plan_finetune(groups(place, **FP8, tensor_parallel_degree=2))
