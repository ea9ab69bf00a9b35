"""Process settings that must be in place before ``import paddle``.

Paddle's MKL picks a slow generic code path on AMD processors, and ``import paddle`` pins OpenMP to
one thread when nothing is set; both are decided at load time, so every script calls
:func:`prepare` first. Values that the user exported are never overridden.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.ending import kept_back
from common.errors import UserError

# glibc mallopt parameters (malloc.h): keep freed activations instead of returning each one to the
# kernel, which costs a page-fault storm on every step.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def cpu_count() -> int:
    """Return the number of cores this process may use (respects taskset and cgroup cpusets)."""
    return len(os.sched_getaffinity(0))


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mkl_code_path(cpu_info: str) -> str | None:
    """Return the ``MKL_DEBUG_CPU_TYPE`` that suits this processor, or None to leave MKL alone."""
    if "AuthenticAMD" not in cpu_info:
        return None
    return "7" if "avx512f" in cpu_info else "5"


def resolve_device(device: str) -> str:
    """Return the device that ``auto`` stands for: ``gpu`` where Paddle can use one, else ``cpu``.

    Decided without importing paddle, since some settings have to be in place before that. Any other
    name is returned as it is.
    """
    if device != "auto":
        return device
    try:
        importlib.metadata.version("paddlepaddle-gpu")
    except importlib.metadata.PackageNotFoundError:
        return "cpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    drivers = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # Linux, and Linux inside Windows
    return "gpu" if not hidden and any(path.exists() for path in drivers) else "cpu"


def process_threads(threads: int | None) -> int | None:
    """Return the CPU threads that this process should use; None leaves it to :func:`prepare`.

    Paddle's launcher hands ``OMP_NUM_THREADS=1`` to its processes when nothing is exported, which
    would leave all cores but one idle: they share the cores instead.

    Args:
        threads: what the user asked for.
    """
    launched = "PADDLE_TRAINERS_NUM" in os.environ
    if threads is None and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        return max(1, cpu_count() // int(os.environ.get("PADDLE_LOCAL_SIZE", "1")))
    return threads


def prepare(threads: int | None = None, device: str = "cpu", *, deterministic: bool = False) -> int:
    """Set thread counts, MKL's code path and the allocator; return the number of threads.

    Args:
        threads: CPU threads to use; None takes ``OMP_NUM_THREADS`` or all cores.
        device: ``cpu`` or ``gpu``; some settings only help one of them.
        deterministic: gradients on a GPU are the same bits in every run: those of FlashAttention
            and of the embedding add up in a fixed order. CPUs' always do.

    Raises:
        RuntimeError: paddle is already imported, so the settings would have no effect.
    """
    if "paddle" in sys.modules:
        raise RuntimeError("llm.runtime.prepare() has to run before paddle is imported")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(cpu_count()))
    os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    if "OMP_WAIT_POLICY" not in os.environ:
        # Idle OpenMP threads would spin for 0.2 s on cores that Paddle's single-threaded kernels
        # and other processes want; a millisecond is enough from one operator to the next.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("KMP_BLOCKTIME", "1")
    code_path = _mkl_code_path(_cpu_info())
    if code_path is not None:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", code_path)
    if device == "cpu":
        # As strided views, 4-D transposes cost tens of times more on CPU (docs/log.md).
        os.environ.setdefault("FLAGS_use_stride_kernel", "0")
    elif deterministic:
        os.environ.setdefault("FLAGS_cudnn_deterministic", "1")  # FlashAttention asks for it
        os.environ.setdefault("FLAGS_embedding_deterministic", "1")
    # Paddle logs an INFO line per C++ subsystem otherwise.
    os.environ.setdefault("GLOG_minloglevel", "2")
    _keep_freed_memory()
    return int(os.environ["OMP_NUM_THREADS"])


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import large packages without Python's garbage collector, which finds nothing among them.

    It would go through all their objects again and again (docs/log.md).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def load_paddle(device: str = "cpu", *, bf16: bool = False) -> None:
    """Import paddle quietly and make ``device`` its current one.

    Paddle warns on standard error whenever ``OMP_NUM_THREADS`` exceeds one, which is what
    :func:`prepare` wants; anything else that it says still appears.

    Args:
        device: ``cpu`` or ``gpu``.
        bf16: whether the device has to compute in bfloat16.

    Raises:
        UserError: the installed Paddle, or this machine, has no such device.
    """
    said = io.StringIO()
    with (
        kept_back(),  # paddle's handlers print a stack and lose what Python would conclude
        fast_imports(),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="No ccache found")
        paddle: Any = importlib.import_module("paddle")
    for handler in list(logging.root.handlers):
        # Paddle's would go on writing to `said`, and swallow what everyone else logs.
        if getattr(handler, "stream", None) is said:
            logging.root.removeHandler(handler)
    for line in said.getvalue().splitlines(keepends=True):
        if "OMP_NUM_THREADS" not in line:
            sys.stderr.write(line)
    if device == "gpu":
        if not paddle.device.is_compiled_with_cuda():
            raise UserError(
                f"device=gpu, but the installed paddle {paddle.__version__} is the CPU wheel; "
                "install paddlepaddle-gpu from Paddle's own package index (README, version "
                "matrix) or use --device cpu"
            )
        if paddle.device.cuda.device_count() == 0:
            raise UserError("device=gpu, but paddle sees no GPU; check nvidia-smi and the driver")
        if bf16 and not paddle.amp.is_bfloat16_supported():
            name = paddle.device.cuda.get_device_name()
            raise UserError(f"bf16 needs an Ampere GPU or newer, not {name}; use --fp16")
    paddle.set_device(device)


def _keep_freed_memory() -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 << 20)
