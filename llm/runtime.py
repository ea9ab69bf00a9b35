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
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from common.devices import AUTO, CPU, CUDA_LIKE, KINDS, how_to_get, kind_of, parse, present
from common.ending import handler_kept
from common.errors import UserError

# glibc mallopt parameters (malloc.h): keep freed activations instead of returning each one to the
# kernel, which costs a page-fault storm on every step.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
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
    """Return what ``auto`` stands for: a device whose driver and wheel are here, else ``cpu``.

    Decided without importing paddle, since some settings have to be in place before that. Any other
    name is returned as it is.
    """
    if device != AUTO:
        return device
    kind = present()
    if kind is None:
        return CPU
    try:
        importlib.metadata.version(KINDS[kind].wheel)
    except importlib.metadata.PackageNotFoundError:
        return CPU
    return kind


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


def prepare(threads: int | None = None, device: str = CPU, *, deterministic: bool = False) -> int:
    """Set thread counts, MKL's code path and the allocator; return the number of threads.

    Args:
        threads: CPU threads to use; None takes ``OMP_NUM_THREADS`` or all cores.
        device: as ``--device`` takes it; some settings only help one kind.
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
    kind = kind_of(device)
    if kind == CPU:
        # As strided views, 4-D transposes cost tens of times more on CPU (docs/log.md).
        os.environ.setdefault("FLAGS_use_stride_kernel", "0")
    elif deterministic and kind in CUDA_LIKE:
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


class _CoreFinder:
    """Finds `paddle.base.core`, whose `init_glog` leaves SIGTERM its handler."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As the import system asks; other modules are left to the others."""
        if name != "paddle.base.core":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.init_glog = handler_kept()(module.init_glog)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _python_hears_signals() -> Iterator[None]:
    """Within this, Paddle's import puts no handler beneath Python's.

    `init_glog`, a second before the import is through, installs one for SIGTERM that prints a stack
    and loses what Python would conclude. It would be called in any thread that libraries started.
    """
    sys.meta_path.insert(0, _CoreFinder)
    try:
        yield
    finally:
        sys.meta_path.remove(_CoreFinder)


def load_paddle(device: str = CPU, *, autocast: str = "float32") -> None:
    """Import paddle quietly and make ``device`` its current one.

    Paddle warns on standard error whenever ``OMP_NUM_THREADS`` exceeds one, which is what
    :func:`prepare` wants; anything else that it says still appears.

    Args:
        device: as ``--device`` takes it.
        autocast: the type that mixed precision has to compute in.

    Raises:
        UserError: the installed Paddle, or this machine, has no such device; or Paddle would go on
            in float32 there, as it does with a mere warning for custom devices that it does not
            know.
    """
    said = io.StringIO()
    with (
        _python_hears_signals(),
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
    _check_device(paddle, device)
    paddle.set_device(device)
    if autocast != "float32" and (why := _no_autocast(paddle, autocast)):
        raise UserError(
            f"mixed precision in {autocast} does not run on device={device}: {why}; use another "
            "type (--bf16, --fp16), or neither"
        )


def _check_device(paddle: Any, device: str) -> None:
    """Refuse a device that Paddle does not have here; say what there is, and what to install."""
    from external_ops import devices

    kind, number = parse(device)
    found = devices.here()
    there = f"paddle {paddle.__version__} has {', '.join(found)} here"
    if kind not in devices.kinds():
        advice = how_to_get(kind, devices.kinds())
        raise UserError(f"device={device}, but {there}; {advice} (docs/devices.md)")
    if devices.cards(kind) == 0:
        what = KINDS[kind].what if kind in KINDS else f"a {kind}"
        raise UserError(
            f"device={device}, but {there}: this build is for {what}, and sees none; check the "
            "driver, and the variable that hides cards"
        )
    if number is not None and number >= devices.cards(kind):
        raise UserError(f"device={device}, but {there}; choose one of these")


def _no_autocast(paddle: Any, dtype: str) -> str:
    """Return why mixed precision does not compute in a type here, or an empty string.

    Paddle says at best by a warning that it goes on in float32, so a product is asked for its type.
    """
    from external_ops import devices

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with paddle.amp.auto_cast(dtype=dtype, level="O1"):
                one = paddle.ones([8, 8])
                found = (one @ one).dtype
        except (RuntimeError, OSError, ValueError) as error:  # what a missing kernel becomes
            return devices.summary(error)
    if found == getattr(paddle, dtype):
        return ""
    told = next((str(one.message) for one in said if "amp" in str(one.message)), "")
    return f"Paddle goes on in float32 ({told or 'and gives no reason'})"


def _keep_freed_memory() -> None:
    _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20})


def return_large_memory() -> None:
    """Let the C library return large blocks to the system when they are freed.

    For runs that want little memory more than the last percents of speed: kept, large blocks that
    come and go among small ones that stay leave holes, a fifth of what a LoRA step takes.
    """
    _mallopt({_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 4 << 20})


def _mallopt(settings: dict[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return
    for name, value in settings.items():
        mallopt(name, value)
