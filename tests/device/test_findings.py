"""What a first run on GPUs would have broken, each as it should be."""

import json

import numpy as np

from tests.device.conftest import words_of

TINY = "__internal_testing__/tiny-random-llama"
HALF = {"bf16": 1, "fp16_opt_level": "O2"}
# Losses near ln 1000 in half precision beside float32's.
BAND = 2e-2


def test_a_run_that_was_resumed_goes_on_bit_for_bit(pretrain):
    flags = HALF | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = pretrain(**flags)
    resumed = pretrain(**flags, resume_from_checkpoint=whole.output / "checkpoint-2")
    assert resumed.rows == whole.rows[2:]
    for name in ("model.safetensors", "checkpoint-4/optimizer.safetensors"):
        assert (resumed.output / name).read_bytes() == (whole.output / name).read_bytes()


def test_half_precision_answers(training_device, tmp_path):
    prompts = [json.dumps({"prompt": prompt}) for prompt in ("A", "The quick brown fox")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    flags = {
        "model_name_or_path": TINY,
        "device": "gpu",
        "dtype": "bfloat16",
        "max_length": 4,
        "data_file": tmp_path / "prompts.jsonl",
        "output_file": tmp_path / "out.jsonl",
    }
    training_device.script("gpu", "predict_generation", words_of(flags))
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == len(prompts)


def test_lora_with_frozen_norms(finetune):
    fused = finetune(use_fused_rms_norm=1, lora=1, **HALF)
    plain = finetune(use_fused_rms_norm=0, lora=1)
    np.testing.assert_allclose(fused["loss"], plain["loss"], rtol=0, atol=BAND)


def test_float16_follows_float32(pretrain, float32):
    half = pretrain(fp16=1, fp16_opt_level="O2", scale_loss=1024)
    np.testing.assert_allclose(half["loss"], float32["loss"], rtol=0, atol=BAND)
