"""The device that Paddle computes on now, and what it tells of itself."""

import paddle

from common.devices import CPU, CUDA_LIKE, DCU, GPU, kind_of


def current() -> str:
    """Return the kind of the current device: cpu, gpu, dcu, xpu or a custom type."""
    kind = kind_of(paddle.device.get_device())
    return DCU if kind == GPU and paddle.device.is_compiled_with_rocm() else kind


def cards(kind: str) -> int:
    """Return how many devices of a kind Paddle has here; the CPU is one."""
    device, core = paddle.device, paddle.base.core
    if kind == CPU:
        return 1
    if kind in CUDA_LIKE:
        fits = device.is_compiled_with_rocm() == (kind == DCU)
        return device.cuda.device_count() if device.is_compiled_with_cuda() and fits else 0
    if kind == "xpu":
        return core.get_xpu_device_count() if device.is_compiled_with_xpu() else 0
    if kind not in (device.get_all_custom_device_type() or []):
        return 0
    return core.get_custom_device_count(kind)


def kinds() -> list[str]:
    """Return the kinds that Paddle has here, those without a device too; the CPU comes first."""
    device = paddle.device
    found = [CPU]
    if device.is_compiled_with_cuda():
        found.append(DCU if device.is_compiled_with_rocm() else GPU)
    if device.is_compiled_with_xpu():
        found.append("xpu")
    return found + [kind for kind in device.get_all_custom_device_type() or [] if kind]


def here() -> list[str]:
    """Return every device that Paddle has here, as ``--device`` takes it."""
    return [
        CPU if kind == CPU else f"{kind}:{number}"
        for kind in kinds()
        for number in range(cards(kind))
    ]


def memory() -> int | None:
    """Return the bytes of the current device; None where it does not tell, as CPUs do not."""
    kind = current()
    if kind == CPU:
        return None
    if kind in CUDA_LIKE:
        return int(paddle.device.cuda.get_device_properties().total_memory)
    try:
        found = int(paddle.device.get_device_properties(paddle.device.get_device()).total_memory)
    except (AttributeError, NameError, RuntimeError, TypeError, ValueError):  # need not answer
        return None
    return found or None


def peak_memory() -> int | None:
    """Return the most bytes that tensors took on the current device so far; None on a CPU."""
    kind = current()
    if kind == CPU:
        return None
    if kind in CUDA_LIKE:
        return int(paddle.device.cuda.max_memory_allocated())
    return int(paddle.device.max_memory_allocated(paddle.device.get_device()))


def summary(error: Exception) -> str:
    """Return the sentence of an error of Paddle's, without its stack, hints and places."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("[Hint")]
    return told[-1].partition(" (at ")[0].partition(" [Hint")[0] if told else type(error).__name__
