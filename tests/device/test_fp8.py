"""Float8 training: the op beside a float64 model of its rounding, and runs on the device."""

import json

import numpy as np
import pytest

from common.errors import UserError
from external_ops.fp8 import BLOCK
from llm.llama.build import build_model
from llm.llama.config import load_config
from llm.train.checks import FP8_BLOCK
from tests.device.conftest import TINY
from tests.device.jobs_fp8 import draw
from tests.device.paths import HALF, RESUMED
from tests.device.test_layouts import LAYOUTS

JOBS = "tests.device.jobs_fp8"
# Every number of e4m3 that is not negative, by the format's definition: 4 bits of exponent with a
# bias of 7, 3 behind the point, the last pattern not a number (Micikevicius et al. 2022).
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
)


def nearest(numbers):
    """Round to e4m3; of two that are as near, the one with an even last bit."""
    sizes = np.minimum(np.abs(numbers), E4M3[-1])
    above = np.searchsorted(E4M3, sizes)
    below = np.maximum(above - 1, 0)
    down, up = sizes - E4M3[below], E4M3[above] - sizes
    taken = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(E4M3[taken], numbers)


def rounded(numbers, height):
    """Round blocks of ``height`` x 128 with a power of two each."""
    rows, columns = numbers.shape
    padded = np.pad(numbers, ((0, -rows % height), (0, -columns % 128)))
    blocks = padded.reshape(padded.shape[0] // height, height, -1, 128)
    largest = np.abs(blocks).max((1, 3), keepdims=True)
    with np.errstate(divide="ignore"):
        scale = np.where(largest > 0, 2.0 ** np.floor(np.log2(448 / largest)), 1)
    scale = np.minimum(scale, 2.0**127)
    return (nearest(blocks * scale) / scale).reshape(padded.shape)[:rows, :columns]


def bfloat16(numbers):
    """Round to bfloat16, ties to even."""
    bits = np.asarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    "case",
    [(130, 256, 384, "bfloat16"), (256, 640, 128, "float32"), (1, 512, 256, "bfloat16")],
    ids=str,
)
def test_a_linear_beside_the_model_of_its_rounding(device, tmp_path, case):
    file = tmp_path / "found.npz"
    device.call("gpu", f"{JOBS}:linear", list(case), str(file))
    found = [array.astype(np.float64) for array in np.load(file).values()]
    x, weight, bias, grad = map(bfloat16, draw(case))
    if case[3] == "float32":
        bias = bfloat16(bias)
    out = bfloat16(rounded(x, 1) @ rounded(weight, 128)) + bias
    to_x = rounded(grad, 1) @ rounded(weight.T, 128)
    to_weight = rounded(x.T, 1) @ rounded(grad.T, 1).T
    for one, wanted in zip(found, (out, to_x, to_weight, grad.sum(0)), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=2**-7, atol=1e-37)
    assert (found[0] != bfloat16(x @ weight) + bias).any(), "nothing was rounded"


def test_what_is_not_finite_is_seen(device):
    """Row 3, and column 200 of the inputs, whose block spoils its neighbours at infinity alone."""
    for value in (float("nan"), float("inf")):
        ((rows, columns),) = device.call("gpu", f"{JOBS}:not_finite", value)
        assert [at for at, finite in enumerate(rows) if not finite] == [3]
        assert [at for at, finite in enumerate(columns) if not finite] == [200]


def test_frozen_inputs_and_no_rows(device):
    (found,) = device.call("gpu", f"{JOBS}:frozen")
    assert found == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("capability", "cuda", "why"),
    [
        ([9, 0], "12.9", ""),
        ([9, 0], "13.0", ""),
        ([9, 0], "12.6", "since CUDA 12.9, this Paddle is for 12.6"),
        ([8, 9], "12.9", "for compute capability 9.0, this GPU has 8.9"),
        ([10, 0], "13.0", "for compute capability 9.0, this GPU has 10.0"),
    ],
)
def test_gpus_that_have_such_products(device, capability, cuda, why):
    (found,) = device.call("gpu", f"{JOBS}:why_not", capability, cuda)
    assert why in found and bool(why) == bool(found)


def test_a_network_is_refused_before_it_is_built():
    assert FP8_BLOCK == BLOCK
    with pytest.raises(UserError, match=r"fp8: .* NVIDIA GPUs, this device is cpu; drop --fp8"):
        build_model(load_config(TINY), fp8=True)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A model without weights, of matrices of whole blocks."""
    directory = tmp_path_factory.mktemp("blocks")
    shape = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    (directory / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return {"model_name_or_path": directory, "learning_rate": 0.003}


def test_pretraining_in_float8_follows_bfloat16(pretrain, blocks):
    plain = pretrain(**HALF, **blocks, max_steps=2)
    run = pretrain(**HALF, **blocks, max_steps=2, fp8=1)
    assert run.rows != plain.rows, "fp8 did nothing"
    np.testing.assert_allclose(run["loss"], plain["loss"], rtol=0, atol=5e-3)


@pytest.mark.long
def test_a_run_in_float8_that_was_resumed_goes_on_bit_for_bit(pretrain, blocks):
    flags = HALF | blocks | {"fp8": 1} | RESUMED
    run = pretrain(**flags)
    again = pretrain(**flags, resume_from_checkpoint=run.output / "checkpoint-2")
    assert again.rows == run.rows[2:]


@pytest.mark.long
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_recomputed_layers_round_alike(pretrain, blocks, level):
    flags = {"bf16": 1, "fp16_opt_level": level, "fp8": 1}
    assert pretrain(**flags, **blocks, recompute=1).rows == pretrain(**flags, **blocks).rows


@pytest.mark.long
@pytest.mark.parametrize("layout", ["stage1", "stage2", "stage3", "pipeline", "ring"])
def test_layouts_of_float8(pretrain, blocks, layout):
    one = pretrain(**HALF, **blocks, fp8=1)
    shares = 2 if layout.startswith("stage") else 1
    flags = HALF | blocks | LAYOUTS[layout] | {"gradient_accumulation_steps": 2 // shares}
    two = pretrain(ranks=2, fp8=1, **flags)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=0, atol=5e-3)
