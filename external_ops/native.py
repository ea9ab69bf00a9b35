"""The compiled kernels of csrc/: where they are, whether they fit, and how they are called.

They come as a package of their own, ``llama_paddle_ops`` (``pip install ./external_ops``), and are
absent on machines without a compiler; :func:`reason` then says why, and everything runs on plain
Paddle operators.
"""

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "emulated")
_INSTALL = "pip install ./external_ops"


@lru_cache(maxsize=1)
def _load() -> tuple[Any | None, str]:
    """Register the operators once; return the library, or None and why there is none."""
    if importlib.util.find_spec("llama_paddle_ops") is None:
        return None, f"the native ops are not built ({_INSTALL} needs g++)"
    import llama_paddle_ops
    import paddle
    from paddle.utils.cpp_extension import extension_utils

    if not llama_paddle_ops.LIBRARY.exists():
        return None, f"llama_paddle_ops has no library; build it again: {_INSTALL}"
    built_for = llama_paddle_ops.build_info()["paddle"]
    if built_for != paddle.__version__:
        return None, (
            f"the native ops were built for Paddle {built_for}, this is {paddle.__version__}; "
            f"build them again: {_INSTALL}"
        )
    path = str(llama_paddle_ops.LIBRARY)
    extension_utils.load_op_meta_info_and_register_op(path)
    return ctypes.CDLL(path), ""


@lru_cache(maxsize=2)
def reason(device: str = "cpu") -> str:
    """Return why there are no operators on ``cpu`` or ``gpu``, or an empty string."""
    found, why = _load()
    if found is not None and device == "gpu":
        import llama_paddle_ops

        if not llama_paddle_ops.build_info()["cuda"]:
            return f"the native ops were built without CUDA; build them where nvcc is: {_INSTALL}"
    return why


def available(device: str = "cpu") -> bool:
    """Tell whether the operators are there; loads them."""
    return not reason(device)


def library() -> Any:
    """Return the C interface (csrc/include) as a ctypes library.

    Raises:
        RuntimeError: the operators are not there.
    """
    found, why = _load()
    if found is None:
        raise RuntimeError(why)
    return found


def run(name: str, *arguments: Any) -> list[Any]:
    """Call operator ``llama_ops_NAME``, eagerly or while a program is traced.

    Args:
        name: of the operator.
        arguments: its inputs, then its attributes, in order; None stands for an absent input.

    Returns:
        Its outputs.

    Raises:
        ValueError: an input that the operator refuses; the message names the value and the limit.
    """
    import paddle

    try:
        return paddle._C_ops._run_custom_op(f"llama_ops_{name}", *arguments)
    except OSError as error:  # what PD_CHECK becomes; the place in the sources is cut off
        raise ValueError(str(error).partition("\n  [")[0]) from None


def level() -> str:
    """Return the instruction set whose kernels run."""
    return LEVELS[library().llama_ops_level()]


def supported_levels() -> list[str]:
    """Return what this processor can run, the emulated level included."""
    native, before = library(), level()
    found = [name for index, name in enumerate(LEVELS) if native.llama_ops_set_level(index) == 0]
    native.llama_ops_set_level(LEVELS.index(before))
    return found


@contextlib.contextmanager
def forced_level(name: str) -> Iterator[None]:
    """Run the kernels of another instruction set for a while.

    Raises:
        ValueError: the processor does not support it.
    """
    native, before = library(), level()
    if native.llama_ops_set_level(LEVELS.index(name)):
        raise ValueError(f"this processor cannot run {name}; it can run {supported_levels()}")
    try:
        yield
    finally:
        native.llama_ops_set_level(LEVELS.index(before))
