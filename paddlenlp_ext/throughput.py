"""Speed and memory of a run: tokens per second, share of the device's peak (MFU), peak memory.

MFU is model FLOPs per second over the peak rate of the device (Chowdhery et al. 2022, appendix B).
Recomputed activations are not counted. For half precision on a GPU the peak is the vendor's dense
tensor-core figure; everywhere else it is the best rate that a large matrix product reaches here.
"""

import functools
import resource
import sys
import time
from dataclasses import dataclass

# Dense half-precision tensor-core peak in TFLOP/s, from the vendor's data sheets, without sparsity.
# Longer names come first: the first one contained in the device's name is taken.
_GPU_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L20", 119.5),
    ("L4", 121.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
_MEASURE_SECONDS = 0.3
_MATRIX = 1024


@dataclass(frozen=True)
class PeakRate:
    """The rate that MFU is relative to, and where the figure comes from."""

    flops_per_second: float
    source: str


def table_rate(device_name: str) -> PeakRate | None:
    """Return the data-sheet peak of a GPU by its name, or None when the table lacks it."""
    for name, tflops in _GPU_TFLOPS:
        if name.lower() in device_name.lower():
            return PeakRate(tflops * 1e12, f"data sheet of {name}, half precision")
    return None


@functools.cache
def measured_rate() -> PeakRate:
    """Time float32 matrix products for a third of a second, once per process; keep the best."""
    import paddle

    left = paddle.full([_MATRIX, _MATRIX], 0.5)  # random values would advance the seeded generator
    best = float("inf")
    deadline = time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        paddle.matmul(left, left).sum().item()
        best = min(best, time.perf_counter() - start)
    return PeakRate(2.0 * _MATRIX**3 / best, f"measured, float32 {_MATRIX}x{_MATRIX} matmul")


def peak_rate(half_precision: bool) -> PeakRate:
    """Return the peak for the current device: from the table, or else measured."""
    import paddle

    if half_precision and paddle.device.is_compiled_with_cuda():
        known = table_rate(paddle.device.cuda.get_device_name())
        if known is not None:
            return known
    return measured_rate()


def peak_tensor_bytes() -> int:
    """Return the most memory that tensors took so far, without the process around them."""
    import paddle

    if paddle.get_device().startswith("gpu"):
        return int(paddle.device.cuda.max_memory_allocated())
    return int(paddle.base.core.host_memory_stat_peak_value("Allocated", 0))


def peak_memory_bytes() -> int:
    """Return the most memory held so far: on the GPU where one is used, else resident memory."""
    import paddle

    if paddle.get_device().startswith("gpu"):
        return int(paddle.device.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
