"""LoRA trained by two tensor ranks in each of two stages: PEFT's losses, and a file PEFT opens."""

import json

import numpy as np
import paddle
from safetensors.numpy import load_file

from llm.llama.adapters.opening import load_adapter
from llm.llama.build import load_model
from llm.llama.merging import merge_lora
from tests.parity.adapter_cases import LORA

# Two tensor ranks split the vocabulary, so its size has to be even.
CASE = LORA["all-linear"] | {"config": LORA["all-linear"]["config"] | {"vocab_size": 96}}


def test_four_ranks_train_as_peft_does(peer, ranks, tmp_path, measured):
    (tmp_path / "cases.json").write_text(json.dumps({"case": CASE}), encoding="utf-8")
    peer("write", tmp_path, "peft_side")
    root = tmp_path / "case"
    layout = {"tensor": 2, "pipeline": 2}
    arguments = (str(root), layout, CASE["steps"], CASE["rate"])
    expected = load_file(root / "expected.safetensors")
    for losses in ranks(4, "jobs_peft:train", *arguments, timeout=120):
        error = float(np.abs(np.array(losses) - expected["losses"]).max())
        assert measured("tp2 x pp2", "20 losses", error) <= 1e-5
    peer("read", tmp_path, "peft_side")
    theirs = load_file(root / "read.safetensors")["logits"]
    model = load_adapter(load_model(root / "base"), root / "ours")
    merge_lora(model)
    with paddle.no_grad():
        merged = model(paddle.to_tensor(expected["batches"][0])).numpy()
    error = float(np.abs(merged - theirs).max())
    assert measured("tp2 x pp2", "our file", error) <= 1e-5
    error = float(np.abs(merged - expected["merged"]).max())
    assert measured("tp2 x pp2", "merged", error) <= 2e-5
