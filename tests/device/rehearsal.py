"""The rehearsal device from Python: a device in host memory, as a GPU or as itself.

``environment`` says what has to be set before Python starts; site/sitecustomize.py then calls
``start`` behind ``import paddle``, in children too. In the role ``gpu`` Paddle's Python answers
what a CUDA build with one H100 would answer, and ``--device gpu`` runs unchanged; in the role
``itself`` the device is of the custom type ``rehearsal``, as NPUs, XPUs and DCUs are of theirs.
"""

import atexit
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLUGIN = HERE / "build" / "plugin"
LIBRARY = PLUGIN / "librehearsal.so"
TYPE = "rehearsal"
ROLES = ("gpu", "itself")
_started: str | None = None


def environment(role: str | None = None) -> dict[str, str]:
    """Return the variables of a process that has the device.

    Args:
        role: one of :data:`ROLES`; None for a process that calls :func:`start` itself.
    """
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    below = dict.fromkeys([str(HERE / "site"), *inherited])
    return {
        "CUSTOM_DEVICE_ROOT": str(PLUGIN),
        "REHEARSAL_ROLE": role or "",
        "GLOG_minloglevel": "2",
        "PYTHONPATH": os.pathsep.join(path for path in below if path),
    }


def rank_environment() -> dict[str, str]:
    """Return what Paddle's launcher sets beyond addresses for processes with a device each."""
    return {
        "PADDLE_DISTRI_BACKEND": "xccl",
        "PADDLE_XCCL_BACKEND": TYPE,
        "FLAGS_selected_gpus": "0",
        f"FLAGS_selected_{TYPE}s": "0",
    }


def library() -> ctypes.CDLL:
    """Return the device's library, which Paddle has loaded already."""
    loaded = ctypes.CDLL(str(LIBRARY))
    for name in ("rehearsal_peak_bytes", "rehearsal_used_bytes"):
        getattr(loaded, name).restype = ctypes.c_size_t
    return loaded


def start(role: str) -> None:
    """Enter the device's kernels, and in the role ``gpu`` the answers of a CUDA build.

    Args:
        role: one of :data:`ROLES`.

    Raises:
        RuntimeError: paddle was imported without :func:`environment`.
    """
    global _started  # noqa: PLW0603
    assert role in ROLES, role
    assert _started in (None, role), f"this process has started in the role {_started}"
    if _started == role:
        return
    import paddle

    if TYPE not in paddle.device.get_all_custom_device_type():
        raise RuntimeError(f"paddle did not load {LIBRARY}: `make device`, CUSTOM_DEVICE_ROOT")
    library().rehearsal_register(int(role == "gpu"))
    _allow_half_precision()
    _forms_without_kernels(paddle)
    if role == "gpu":
        _Answers(paddle).install()
    _started = role
    os.environ.update(environment(role))  # for children
    atexit.register(finish)


def finish() -> None:
    """Let the other processes have what this one was asked to send; called at exit."""
    if _started is not None:
        library().rehearsal_finish()


def _allow_half_precision() -> None:
    """Have mixed precision take the device, as Paddle has it take the types that it knows by name.

    For other custom types it only warns, and goes on in float32.
    """
    module = sys.modules["paddle.amp.auto_cast"]
    for name in dir(module):
        if name.startswith("_is_custom_device_"):
            setattr(module, name, lambda *_: True)


def _forms_without_kernels(paddle: Any) -> None:
    """Give fleet's operators, which have kernels on GPUs only, a form of other operators."""
    import paddle.distributed as dist
    from paddle.autograd import PyLayer
    from paddle.distributed.collective import _get_group_map

    class Concat(PyLayer):
        """Every rank's last axis side by side; the gradient is this rank's part."""

        @staticmethod
        def forward(ctx: Any, x: Any, rank: int, ranks: int, ring: int) -> Any:
            ctx.place = rank, ranks
            parts: list[Any] = []
            dist.all_gather(parts, x.contiguous(), group=_get_group_map()[ring])
            return paddle.concat(parts, axis=-1)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            rank, ranks = ctx.place
            return paddle.split(grad, ranks, axis=-1)[rank].contiguous()

    def split(x: Any, rank: int, ranks: int, *_: Any) -> Any:
        return paddle.split(x, ranks, axis=-1)[rank].contiguous()

    def concat(x: Any, rank: int, ranks: int, ring: int, *_: Any) -> Any:
        return Concat.apply(x, rank, ranks, ring)

    paddle._C_ops.c_identity = lambda x, *_: paddle.assign(x)
    paddle._C_ops.c_split = split
    paddle._C_ops.c_concat = concat


class _Properties:
    """What ``paddle.device.cuda.get_device_properties`` returns for an H100."""

    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    total_memory = 80 << 30
    multi_processor_count = 132


class _Answers:
    """What Python asks of CUDA, answered for the device."""

    # Of CUDA builds; the values are Paddle's defaults.
    FLAGS = {  # noqa: RUF012
        "FLAGS_cudnn_deterministic": False,
        "FLAGS_flash_attn_version": 2,
        "FLAGS_embedding_deterministic": 0,
    }

    def __init__(self, paddle: Any) -> None:
        from paddle.base import core

        self.paddle, self.core = paddle, core
        self.flags = dict(self.FLAGS)

    def install(self) -> None:
        """Put the answers in Paddle's place."""
        self._build()
        self._device()
        self._memory()
        self._precision()
        self._flags()
        self._random_state()
        self._inference()

    def _place(self, number: int = 0) -> Any:
        return self.core.CustomPlace(TYPE, number)

    def _build(self) -> None:
        paddle, core = self.paddle, self.core
        paddle.is_compiled_with_cuda = paddle.device.is_compiled_with_cuda = lambda: True
        core.get_cuda_device_count = lambda: core.get_custom_device_count(TYPE)
        paddle.device.cuda.device_count = core.get_cuda_device_count
        core.default_cuda_generator = lambda i: core.default_custom_device_generator(self._place(i))
        paddle.CUDAPinnedPlace = paddle.CPUPlace
        paddle.version.cuda = lambda: "12.9"
        paddle.device.get_all_custom_device_type = list  # paddle's own code asks its core

    def _device(self) -> None:
        paddle, cuda = self.paddle, self.paddle.device.cuda
        real_set, real_get = paddle.device.set_device, paddle.device.get_device
        real_wait = paddle.device.synchronize

        def renamed(device: Any) -> Any:
            is_gpu = isinstance(device, str) and device.startswith("gpu")
            return device.replace("gpu", TYPE) if is_gpu else device

        def wait(device: Any = None) -> None:
            real_wait(f"{TYPE}:0" if device is None else renamed(device))

        paddle.set_device = paddle.device.set_device = lambda device: real_set(renamed(device))
        paddle.get_device = paddle.device.get_device = lambda: real_get().replace(TYPE, "gpu")
        paddle.device.synchronize = cuda.synchronize = wait
        cuda.get_device_name = lambda *_: _Properties.name
        cuda.get_device_properties = lambda *_: _Properties()
        cuda.get_device_capability = lambda *_: (_Properties.major, _Properties.minor)

    def _memory(self) -> None:
        cuda, loaded = self.paddle.device.cuda, library()
        cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_: (
            loaded.rehearsal_peak_bytes()
        )
        cuda.reset_max_memory_allocated = lambda *_: loaded.rehearsal_forget_peak()
        cuda.memory_allocated = cuda.memory_reserved = lambda *_: loaded.rehearsal_used_bytes()
        cuda.empty_cache = lambda: None

    def _precision(self) -> None:
        from paddle.nn.attention import sdpa

        amp = self.paddle.amp
        amp.is_bfloat16_supported = amp.is_float16_supported = lambda *_: True
        sdpa._set_enabled_backends(list(sdpa.SDPBackend)[1:])

    def _flags(self) -> None:
        paddle = self.paddle
        real_get, real_set = paddle.get_flags, paddle.set_flags

        def get_flags(names: Any) -> dict[str, Any]:
            names = [names] if isinstance(names, str) else list(names)
            others = [name for name in names if name not in self.flags]
            known = {name: self.flags[name] for name in names if name in self.flags}
            return known | (real_get(others) if others else {})

        def set_flags(values: dict[str, Any]) -> None:
            self.flags.update({name: values[name] for name in values if name in self.flags})
            others = {name: values[name] for name in values if name not in self.flags}
            if others:
                real_set(others)

        paddle.get_flags = paddle.base.framework.get_flags = get_flags
        paddle.set_flags = paddle.base.framework.set_flags = set_flags

    def _random_state(self) -> None:
        paddle = self.paddle
        real_get, real_set = paddle.get_rng_state, paddle.set_rng_state

        def renamed(device: Any) -> Any:
            return f"{TYPE}:0" if device == "gpu" else device

        paddle.get_rng_state = lambda device=None, **more: real_get(renamed(device), **more)
        paddle.set_rng_state = lambda state, device=None, **more: real_set(
            state, renamed(device), **more
        )

    def _inference(self) -> None:
        from paddle import inference

        def enable_use_gpu(config: Any, megabytes: int, number: int = 0, *_: Any) -> None:
            config.enable_custom_device(TYPE, number)

        inference.Config.enable_use_gpu = enable_use_gpu
