"""Published command lines on several processes: what they log is what one process logs."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from data.corpus.token_store_writer import TokenStoreWriter

# PaddleNLP's run_trainer_tp4pp2.sh but for sizes, paths, and what a CPU lacks (fp16).
TP4PP2 = """
--model_type llama --model_name_or_path {model} --input_dir {store} --output_dir {output}
--split 949,50,1 --max_seq_length 16 --per_device_train_batch_size 1
--per_device_eval_batch_size 4 --gradient_accumulation_steps {accumulation}
--use_flash_attention 1 --use_fused_rms_norm 0
--tensor_parallel_degree {tp} --pipeline_parallel_degree {pp} --virtual_pp_degree 1
--sequence_parallel 0 --learning_rate 0.001 --min_learning_rate 0.0001 --max_steps 5
--save_steps 5 --weight_decay 0.01 --warmup_ratio 0.01 --max_grad_norm 1.0 --logging_steps 1
--dataloader_num_workers 1 --eval_steps 1000 --report_to none --sharding stage1
--disable_tqdm true --continue_training 0 --recompute 1 --recompute_granularity full
--do_train --do_eval --device cpu --data_impl mmap
--pipeline_parallel_config disable_p2p_cache_shape
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Random documents over a small vocabulary."""
    prefix = tmp_path_factory.mktemp("store") / "corpus"
    random = np.random.default_rng(5)
    with TokenStoreWriter(prefix, "uint16", vocab_size=256) as writer:
        for _ in range(60):
            writer.add_document(random.integers(0, 256, random.integers(5, 60)))
    return prefix


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory without weights, whose heads four ranks can share."""
    directory = tmp_path_factory.mktemp("model")
    shape = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    (directory / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return directory


def logged(output) -> list[dict]:
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_published_tp4pp2_line_equals_one_process(trainers, store, model, tmp_path):
    runs = {}
    for name, (tp, pp, count) in {"one": (1, 1, 1), "eight": (4, 2, 8)}.items():
        output = tmp_path / name
        line = TP4PP2.format(model=model, store=store, output=output, tp=tp, pp=pp, accumulation=4)
        trainers(count, "jobs_scripts:run_script", "run_pretrain", line.split(), timeout=150)
        runs[name] = logged(output)
    for figure, count in (("loss", 5), ("grad_norm", 5), ("eval_loss", 1)):
        one, eight = ([r[figure] for r in runs[name] if figure in r] for name in ("one", "eight"))
        assert len(one) == count
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)


LORA = """
--model_name_or_path __internal_testing__/tiny-random-llama --task_name squad --lora true
--lora_rank 4 --output_dir {output} --chat_template simple --do_train --max_steps 5
--learning_rate 0.003 --per_device_train_batch_size 2 --gradient_accumulation_steps 2
--logging_steps 1 --save_strategy no --tensor_parallel_degree {tp}
--pipeline_parallel_degree {pp} --max_grad_norm 0.5
"""


def test_lora_over_tensor_ranks_and_stages_equals_one_process(trainers, tmp_path):
    """The files are PEFT's whatever the layout; tests/parity shows that PEFT loads them."""
    runs, adapters = {}, {}
    for name, (tp, pp) in {"one": (1, 1), "four": (2, 2)}.items():
        output = tmp_path / name
        words = LORA.format(output=output, tp=tp, pp=pp).split()
        trainers(tp * pp, "jobs_scripts:run_script", "finetune_generation", words, timeout=120)
        runs[name] = [r["loss"] for r in logged(output) if "loss" in r]
        adapters[name] = load_file(output / "adapter_model.safetensors")
    np.testing.assert_allclose(runs["four"], runs["one"], rtol=0, atol=1e-5)
    assert adapters["four"].keys() == adapters["one"].keys()
    for key, expected in adapters["one"].items():
        np.testing.assert_allclose(adapters["four"][key], expected, rtol=0, atol=1e-5, err_msg=key)
    config = [(tmp_path / name / "adapter_config.json").read_text("utf-8") for name in runs]
    assert json.loads(config[0]) == json.loads(config[1])


BLEND = """
--model_name_or_path __internal_testing__/tiny-random-llama --input_dir {blend}
--output_dir {output} --max_seq_length 16 --do_train --max_steps 6 --save_steps 3
--per_device_train_batch_size {batch} --learning_rate 0.001 --logging_steps 1 --device cpu
"""


@pytest.mark.long
def test_any_number_of_data_ranks_takes_the_same_samples_of_a_blend(trainers, tmp_path):
    """Also where a run goes on with other ranks than it began with."""
    random, stores = np.random.default_rng(7), []
    for name, high in (("a", 200), ("b", 900)):
        stores.append(tmp_path / name)
        with TokenStoreWriter(stores[-1], "uint16") as writer:
            for _ in range(60):
                writer.add_document(random.integers(0, high, random.integers(5, 60)))
    blend = f"0.3 {stores[0]} 0.7 {stores[1]}"
    runs, orders = {}, {}
    for ranks in (1, 2, 4):
        output = tmp_path / str(ranks)
        words = BLEND.format(blend="BLEND", output=output, batch=8 // ranks).split()
        words[words.index("BLEND")] = blend
        trainers(ranks, "jobs_scripts:run_script", "run_pretrain", words, timeout=150)
        state = json.loads((output / "checkpoint-6" / "loader_state.json").read_text())
        orders[ranks] = {name: state[name] for name in ("order", "store", "weights")}
        runs[ranks] = [row["loss"] for row in logged(output) if "loss" in row]
    assert orders[1] == orders[2] == orders[4] and len(runs[1]) == 6
    for ranks in (2, 4):
        np.testing.assert_allclose(runs[ranks], runs[1], rtol=0, atol=1e-5)
    other = tmp_path / "other"
    words = BLEND.format(blend="BLEND", output=other, batch=4).split()
    words[words.index("BLEND")] = blend
    words += ["--resume_from_checkpoint", str(tmp_path / "4" / "checkpoint-3")]
    trainers(2, "jobs_scripts:run_script", "run_pretrain", words, timeout=150)
    again = [row["loss"] for row in logged(other) if "loss" in row]
    np.testing.assert_allclose(again, runs[1][3:], rtol=0, atol=1e-5)
