"""``--device`` with a type that is no GPU: the scripts, what is refused, what each op can do."""

import json

import numpy as np
import pytest

from external_ops.modes import OPS
from tests.device.conftest import TINY, words_of
from tests.device.test_training import assert_follows
from tests.distributed.rank_server import RankError, free_port

JOBS = "tests.device.jobs_device"
TYPES = ["float32", "bfloat16", "float16"]
HALF = {"bf16": 1, "fp16_opt_level": "O2"}
PROMPTS = ("A", "The quick brown fox")
PADDLE = {"rms_norm", "add_rms_norm", "causal_attention"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of prompts."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS), encoding="utf-8")
    return file


@pytest.fixture
def predict(training_device, prompts, tmp_path):
    """``predict(role, **flags)``: greedy answers of the built-in model."""

    def run(role, device, **flags):
        out = tmp_path / f"{role}-{len(list(tmp_path.iterdir()))}.jsonl"
        usual = {"model_name_or_path": TINY, "max_length": 6, "data_file": prompts}
        words = words_of(usual | {"device": device, "output_file": out} | flags)
        training_device.script(role, "predict_generation", words)
        return [json.loads(line)["output"] for line in out.read_text("utf-8").splitlines()]

    return run


def test_pretraining(pretrain, float32):
    assert_follows(pretrain(role="itself", **HALF), float32)


def test_lora(finetune):
    half = finetune(role="itself", lora=1, **HALF)
    np.testing.assert_allclose(half["loss"], finetune(lora=1)["loss"], rtol=0, atol=2e-2)


def test_answers(predict):
    """In float32 those of a CPU; in bfloat16 there are some."""
    assert predict("itself", "rehearsal") == predict("itself", "cpu", ops="reference")
    assert len(predict("itself", "rehearsal:0", dtype="bfloat16")) == len(PROMPTS)


@pytest.mark.long  # tests/device/test_device_inference.py has it as a GPU
def test_export_and_inference(device, prompts, tmp_path):
    flags = {"model_name_or_path": TINY, "device": "rehearsal", "output_path": tmp_path / "llama"}
    device.script("itself", "export_generation_model", words_of(flags))
    flags = {"model_dir": tmp_path, "device": "rehearsal", "data_file": prompts, "max_length": 6}
    words = words_of(flags | {"output_file": tmp_path / "out.jsonl"})
    device.script("itself", "infer_generation", words)
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == len(PROMPTS)


def test_serving(device, tmp_path):
    words = words_of({"model_name_or_path": TINY, "device": "rehearsal"})
    request, file = {"inputs": "A", "parameters": {"max_new_tokens": 4}}, tmp_path / "answer"
    device.call("itself", f"{JOBS}:served", "itself", words, free_port(), request, str(file))
    assert json.loads(file.read_text("utf-8"))["generated_text"]


NPU = (
    "device=npu, but paddle 3.3.1 has cpu, rehearsal:0, rehearsal:1 here; for an Ascend NPU, `make "
    "setup DEVICE=npu`, or paddlepaddle==3.3.0 from PyPI and beside it `pip install "
    "paddle-custom-npu==3.3.0 -i https://www.paddlepaddle.org.cn/packages/stable/npu/` "
    "(docs/devices.md)"
)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("npu", NPU),
        ("gpu", "in its place `pip install paddlepaddle-gpu=="),
        ("rehersal", "did you mean"),
        ("rehearsal:2", "has cpu, rehearsal:0, rehearsal:1 here; choose one of these"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(device, named, said):
    (found,) = device.call("itself", f"{JOBS}:refusal", named)
    assert said in found and "rehearsal:0" in found


def test_a_type_in_which_paddle_would_silently_take_float32_is_refused(device, pretrain):
    (found,) = device.call("itself", f"{JOBS}:refusal", "rehearsal", "bfloat16", False)
    assert "bfloat16 does not run on device=rehearsal: Paddle goes on in float32" in found
    assert "CustomPlace only support float16" in found
    assert device.call("itself", f"{JOBS}:refusal", "rehearsal", "float16", False) == [""]
    with pytest.raises(RankError, match="Paddle goes on in float32"):
        pretrain(role="itself", before=f"{JOBS}:forget_half_precision", **HALF)


@pytest.mark.parametrize(("role", "name"), [("gpu", "gpu"), ("itself", "rehearsal")])
def test_a_card_is_chosen_by_its_number(device, role, name):
    for number in range(2):
        target = f"{name}:{number}"
        (place,) = device.call(role, f"{JOBS}:place_of", target)
        assert place == f"Place(rehearsal:{number})"


def test_what_each_op_can_do(device):
    """The table of ``python -m llama_paddle_ops``; on a GPU Paddle's kernels come first."""
    (own,) = device.call("itself", f"{JOBS}:capabilities")
    (gpu,) = device.call("gpu", f"{JOBS}:capabilities")
    assert list(own) == list(gpu) == list(OPS)
    for op in OPS:
        form = "plain" if op == "cross_entropy" else "reference"
        types = [] if op == "decoder" else TYPES
        assert own[op] == [form, *types]
        assert gpu[op][1:] == types
        assert op not in PADDLE or gpu[op][0] == "paddle"
