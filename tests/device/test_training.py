"""Training scripts with ``--device gpu`` on the rehearsal device."""

import json

import numpy as np
import pytest

from data.corpus.token_store_writer import TokenStoreWriter

# Losses of bfloat16 weights with float32 master weights beside float32's: the loss is near ln 256,
# and logits that are rounded to 8 bits move it by less than a thousandth of that.
BAND = 5e-3
PRETRAIN = """
--model_type llama --max_seq_length 16 --split 949,50,1 --learning_rate 0.01 --max_steps 3
--logging_steps 1 --weight_decay 0.1 --use_flash_attention 1 --use_fused_rms_norm 1 --do_train
--report_to none --disable_tqdm true --save_strategy no --device gpu
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
    """A model directory without weights; heads of 8, which FlashAttention takes."""
    directory = tmp_path_factory.mktemp("model")
    shape = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    (directory / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def pretrain(training_device, store, model, tmp_path_factory):
    """Return a function that pretrains with a batch of four rows; its losses and gradient norms."""

    def run(*words, ranks=1, environment=None, before=None):
        output = tmp_path_factory.mktemp("run")
        line = [*PRETRAIN.split(), "--model_name_or_path", model, "--input_dir", store]
        line += ["--output_dir", output, "--per_device_train_batch_size", 2]
        line += ["--gradient_accumulation_steps", 2 // ranks, *words]
        options = {"environment": environment or {}, "timeout": 100}
        training_device.script("gpu", "run_pretrain", line, ranks, before=before, **options)
        lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        logged = [json.loads(line) for line in lines]
        return {name: [row[name] for row in logged] for name in ("loss", "grad_norm")}

    return run


@pytest.fixture(scope="module")
def float32(pretrain):
    """Losses and norms of one GPU in float32."""
    return pretrain()


def test_bfloat16_follows_float32(pretrain, float32):
    half = pretrain("--bf16", "1", "--fp16_opt_level", "O2")
    np.testing.assert_allclose(half["loss"], float32["loss"], rtol=0, atol=BAND)
    assert half["loss"] != float32["loss"]
    assert max(float32["loss"]) - min(float32["loss"]) > BAND, "the band holds nothing"


def test_two_ranks_of_data_parallel_equal_one(pretrain, float32):
    two = pretrain(ranks=2)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(two[name], float32[name], rtol=0, atol=1e-5)


def test_training_that_forgets_the_waits_is_noticed(pretrain, float32):
    """What the test above is good for: sums that nobody waits for are not there in time."""
    two = pretrain(ranks=2, before="tests.device.jobs_device:forget_waits")
    assert not np.allclose(two["grad_norm"], float32["grad_norm"], rtol=0, atol=1e-5)
