"""Limitations of the pinned Paddle that code here works around.

A test that fails after an upgrade names a workaround that may no longer be needed; docs/log.md has
the reasons. What the forms cost is measured by benchmarks/bench_cpu_ops.py.
"""

import gc
import os
import signal
import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddle import inference, nn
from paddle.autograd import PyLayer
from paddle.incubate.nn import functional as incubate
from paddle.nn import functional as F
from paddle.static import InputSpec

from external_ops.rms_norm import has_fused_cpu
from external_ops.tensors import tensor_from

ROWS, WIDTH = 64, 8


def test_safetensors_reader_needs_the_kernel_that_is_switched_off(tmp_path):
    """Why ``llm.llama.files.safetensors`` reads files itself."""
    from safetensors.paddle import load_file, save_file

    flag = "FLAGS_use_stride_kernel"
    assert paddle.get_flags(flag) == {flag: False}
    save_file({"x": paddle.ones([2])}, tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match="view_dtype"):
        load_file(tmp_path / "x.safetensors")


@pytest.mark.skipif(not has_fused_cpu(), reason="the kernel needs AVX-512, and ends the process")
def test_fused_rms_norm_has_no_gradient():
    """Why ``external_ops.rms_norm`` writes the gradient out."""
    x, weight = paddle.randn([3, 8]), paddle.ones([8])
    x.stop_gradient = False
    out = incubate.fused_rms_norm(x, weight, None, 1e-5, begin_norm_axis=1)[0]
    with pytest.raises(RuntimeError, match="not registered"):
        out.sum().backward()


@pytest.mark.skipif(has_fused_cpu(), reason="the processor has AVX-512")
def test_fused_rms_norm_ends_the_process_without_avx512():
    """Why ``external_ops.rms_norm`` asks the processor before it takes the kernel."""
    code = (
        "import paddle; from paddle.incubate.nn.functional import fused_rms_norm as f\n"
        "f(paddle.ones([2, 16]), paddle.ones([16]), None, 1e-5, begin_norm_axis=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGILL


def test_rms_norm_of_nn_functional_is_missing():
    """Why the fused kernel comes from ``paddle.incubate``."""
    with pytest.raises(RuntimeError, match="not registered"):
        F.rms_norm(paddle.ones([2, 4]), [4], paddle.ones([4]))


class _Product(PyLayer):
    @staticmethod
    def forward(ctx, x, y):
        return x * y

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


def test_a_frozen_input_of_a_custom_gradient_has_to_get_none():
    """Why kernels with a gradient of their own ask which inputs are frozen."""
    x, frozen = paddle.ones([2]), paddle.ones([2])
    x.stop_gradient = False
    with pytest.raises(ValueError, match="should return None"):
        _Product.apply(x, frozen).sum().backward()


def test_recompute_below_a_frozen_input_loses_gradients():
    """Why ``llm.llama.build`` marks the first layer's input, and a prefix is an input too."""
    from paddle.distributed.fleet.utils import recompute

    layer, x = nn.Linear(3, 3), paddle.ones([2, 3])
    assert recompute(layer, x).stop_gradient and not layer(x).stop_gradient


def test_mean_cross_entropy_divides_by_ignored_labels_too():
    """Why objectives sum losses, and divide themselves."""
    logits, labels = paddle.randn([8, 5]), paddle.zeros([8], dtype="int64")
    labels[:4] = -100
    mean = F.cross_entropy(logits, labels, ignore_index=-100).item()
    valid = F.cross_entropy(logits[4:], labels[4:]).item()
    assert mean == pytest.approx(valid / 2, rel=1e-5)


def test_cross_entropy_stops_at_64():
    """Why ``external_ops.cross_entropy`` computes losses itself."""
    logits = paddle.to_tensor([[0.0, 500.0]])
    assert F.cross_entropy(logits, paddle.to_tensor([0])).item() == 64


def test_bfloat16_has_no_matrix_product():
    """Why half precision on a CPU is refused instead of tried."""
    x = paddle.ones([2, 2]).astype("bfloat16")
    with pytest.raises(RuntimeError, match="matmul"):
        paddle.matmul(x, x)


def test_auto_cast_does_nothing():
    """Why ``--bf16`` on a CPU is an error: Paddle would compute in float32 without a word."""
    with paddle.amp.auto_cast(dtype="bfloat16", level="O1"):
        assert paddle.matmul(paddle.ones([2, 2]), paddle.ones([2, 2])).dtype == paddle.float32


def test_importing_paddle_pins_openmp_to_one_thread():
    """Why ``runtime.prepare`` comes before ``import paddle``."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    code = "import os, paddle; print(os.environ['OMP_NUM_THREADS'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "1"


def test_onednn_is_on_unless_switched_off():
    """Why ``llm.engine.runners`` switches it off by name."""
    assert inference.Config().mkldnn_enabled()


class _Writer(nn.Layer):
    def __init__(self, write) -> None:
        super().__init__()
        self.write = write

    def forward(self, cache, rows, values):
        return paddle.gather(self.write(cache, rows, values), rows)


@pytest.mark.parametrize(
    ("write", "in_place"),
    [
        (lambda cache, rows, values: paddle.index_put_(cache, (rows,), values), True),
        (paddle.scatter_, False),
    ],
    ids=["index_put_", "scatter_"],
)
def test_what_writes_into_the_input_of_an_exported_program(tmp_path, write, in_place):
    """Why ``paged_attention_ref`` takes the slower ``index_put_``."""
    spec = [InputSpec([None, WIDTH]), InputSpec([None], "int64"), InputSpec([None, WIDTH])]
    program = paddle.jit.to_static(_Writer(write), full_graph=True, input_spec=spec)
    paddle.jit.save(program, str(tmp_path / "writer"))
    config = inference.Config(str(tmp_path / "writer.json"), str(tmp_path / "writer.pdiparams"))
    config.disable_mkldnn()
    config.enable_new_ir(True)
    config.enable_new_executor(True)
    config.disable_glog_info()
    cache, rows = paddle.zeros([ROWS, WIDTH]), paddle.to_tensor([3, 5])
    values = paddle.full([2, WIDTH], 7.0)
    returned = inference.create_predictor(config).run([cache, rows, values])[0].numpy()
    np.testing.assert_array_equal(returned, values.numpy())
    assert bool((cache.numpy()[[3, 5]] == 7).all()) is in_place


def _lost(make, calls=10_000):
    """Return how many of Python's blocks are held after calls whose results are not."""
    make()
    gc.collect()  # not in between, of what others left
    before = sys.getallocatedblocks()
    for _ in range(calls):
        make()
    return sys.getallocatedblocks() - before


def test_tensors_of_arrays_lose_memory():
    """Why ``external_ops.tensors`` fills empty ones."""
    array = np.ones([16, 7])
    assert _lost(lambda: paddle.to_tensor(array, place="cpu")) >= 15_000
    assert _lost(lambda: tensor_from(array, on_host=True)) < 1000
