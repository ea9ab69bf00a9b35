"""The CUDA kernels on a GPU, through PyTorch tensors; needs neither Paddle nor its GPU wheel.

    python -m tests.native.torch_harness [--archs 90]

Builds the library with nvcc alone and runs every check of the emulated tests on the device, more
lines of them, and the fragments of mma and ldmatrix against the hardware.
"""

import argparse
import itertools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.native import cuda_checks as checks
from tests.native.attention_checks import Case, check_attention
from tests.native.cuda_interface import CudaOps
from tests.native.emulated import CSRC, PROBE
from tests.native.storage import from_storage, to_storage


class TorchArrays:
    """PyTorch tensors on the current CUDA device; outputs start as NaN, unless time matters."""

    def __init__(self) -> None:
        self.fill = True

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a tensor."""
        import torch

        if not self.fill:
            return torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
        return torch.full(shape, float("nan"), dtype=getattr(torch, dtype), device="cuda")

    def put(self, x: np.ndarray, dtype: str) -> Any:
        """Return a copy of float32 numbers."""
        import torch

        stored = to_storage(x, dtype)
        if dtype == "bfloat16":
            return torch.from_numpy(stored.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(stored).cuda()

    def get(self, x: Any, dtype: str) -> np.ndarray:
        """Return the numbers in float64."""
        import torch

        if dtype == "bfloat16":
            stored = x.view(torch.int16).cpu().numpy().view(np.uint16)
            return from_storage(stored, dtype).astype(np.float64)
        return x.cpu().numpy().astype(np.float64)

    def integers(self, x: np.ndarray) -> Any:
        """Return a copy of integers."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(x)).cuda()

    @staticmethod
    def pointer(tensor: Any) -> int | None:
        """Return the address."""
        return None if tensor is None else tensor.data_ptr()

    @staticmethod
    def stream() -> int:
        """Return PyTorch's stream."""
        import torch

        return torch.cuda.current_stream().cuda_stream


def build(archs: list[str], target: Path, *, probe: bool = True) -> CudaOps:
    """Compile csrc/laboratory/cuda and link a library of it alone.

    Raises:
        subprocess.CalledProcessError: nvcc failed; its messages are on stderr.
    """
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = ["nvcc", "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", *flags, "-t", "0"]
    command += [f"-I{CSRC}", f"-I{CSRC / 'include'}", "-o", str(target)]
    sources = [*sorted(CSRC.glob("laboratory/cuda/*.cu")), *([PROBE] if probe else [])]
    subprocess.run([*command, *map(str, sources)], check=True)
    return CudaOps(str(target), TorchArrays())


def _attention_cases() -> list[Case]:
    cases = []
    for size, dtype, (heads, groups) in itertools.product(
        (64, 128), ("bfloat16", "float16"), ((2, 2), (4, 1), (8, 1))
    ):
        shape = {"size": size, "dtype": dtype, "heads": heads, "groups": groups}
        cases += [Case(queries, **shape) for queries in (1, 17, 130, 1000)]
        cases.append(Case(200, prefix=77, **shape))
        cases.append(Case(500, documents=((500,), (-500,), (10, 490), (100, -30, 1, 369)), **shape))
        cases.append(Case(300, prefix=100, documents=((100, 200),), **shape))
        cases.append(Case(300, prefix=100, documents=((100, 200),), every=False, **shape))
    return cases


def run_checks(ops: CudaOps) -> int:
    """Run every check; print each with its errors; return how many there were.

    Raises:
        AssertionError: the first that fails.
    """
    arrays, count = ops.arrays, 0

    def report(name: str, found: checks.Checked) -> None:
        nonlocal count
        count += 1
        print(name, {k: f"{ours:.2g} (plain {plain:.2g})" for k, (ours, plain) in found.items()})

    for dtype in ("float32", "bfloat16", "float16"):
        for rows, size in itertools.product((0, 1, 5, 123, 2049), (8, 65, 1024, 4096, 16384)):
            found = checks.check_rms_norm(ops, arrays, rows, size, dtype)
            report(f"rms_norm {rows}x{size} {dtype}", found)
        for size in (10, 64, 128):
            found = checks.check_rotary(ops, arrays, 123, (8, 2), size, dtype, "float32")
            report(f"rotary {size} {dtype}", found)
    for case in _attention_cases():
        report(str(case), check_attention(ops, arrays, case))
    for bits, dtype, rows in itertools.product(
        (8, 4), ("bfloat16", "float16"), (1, 5, 16, 17, 65, 500)
    ):
        for outputs, inputs, groups in ((33, 288, 9), (2048, 4096, 1), (1000, 4096, 32)):
            shape = rows, outputs, inputs
            found = checks.check_linear(ops, arrays, shape, bits, groups, dtype, bias=True)
            report(f"linear {shape} {groups} groups {bits} bits {dtype}", found)
    return count


def check_probes(ops: CudaOps) -> None:
    """Compare mma and ldmatrix of this device with the documented positions."""
    import ctypes

    rng, arrays = np.random.default_rng(0), ops.arrays

    def address(x: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(arrays.pointer(x))

    a, b = rng.integers(-9, 9, (16, 16)), rng.integers(-9, 9, (16, 8))
    stored = [arrays.put(x.astype(np.float32), "bfloat16") for x in (a, b)]
    c, stream = arrays.empty((16, 8), "float32"), ctypes.c_void_p(arrays.stream())
    ops.library.probe_mma(*map(address, (*stored, c)), stream)
    np.testing.assert_array_equal(arrays.get(c, "float32"), a @ b)
    matrices = np.arange(4 * 64, dtype=np.int16).reshape(4, 8, 8)
    out = arrays.integers(np.zeros((2, 4, 32), np.int32))
    ops.library.probe_matrices(address(arrays.integers(matrices)), address(out), stream)
    pairs = np.stack([matrices, matrices.swapaxes(1, 2)]).copy().view(np.int32)
    np.testing.assert_array_equal(out.cpu().numpy(), pairs.reshape(2, 4, 32))


def main() -> None:
    """Build, check, say how much was checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=["90"], help="architectures to build for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        ops = build(options.archs, Path(directory) / "cuda.so")
        check_probes(ops)
        print(f"{run_checks(ops)} checks passed")


if __name__ == "__main__":
    main()
