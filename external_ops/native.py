"""The compiled kernels of csrc/: where they are, whether they fit, and how they are called.

They come as a package of their own, ``llama_paddle_ops`` (``pip install ./external_ops``), and are
absent on machines without a compiler; :func:`reason` then says why, and everything runs on plain
Paddle operators.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from external_ops import building

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "emulated")
# Of packed weights (csrc/include/llama_ops/linear.h). Exported programs hold them: count up when it
# changes.
PACKED_LAYOUT = 1
_INSTALL = "pip install ./external_ops"

_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _load() -> tuple[Any | None, str]:
    """Register the operators once; return the library, or None and why there is none."""
    if importlib.util.find_spec("llama_paddle_ops") is None:
        return None, f"the native ops are not built ({_INSTALL} needs g++)"
    import llama_paddle_ops

    if why := llama_paddle_ops.misfit():
        return None, why
    found = llama_paddle_ops.load()
    _warn_of_surprises(llama_paddle_ops.build_info(), LEVELS[found.llama_ops_level()])
    return found, ""


def _warn_of_surprises(info: dict[str, Any], taken: str) -> None:
    """Say when the library is not what the sources beside it, or the environment, ask for."""
    if building.CSRC.is_dir() and info["sources"] != building.digest():
        _log.warning("the native ops were built from other sources than these; make ops")
    asked = os.environ.get("LLAMA_OPS_LEVEL", taken)
    if asked != taken:
        _log.warning("LLAMA_OPS_LEVEL=%s is not there; the level is %s", asked, taken)


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


@lru_cache(maxsize=1)
def _dispatcher() -> Any:
    import paddle

    return paddle._C_ops._run_custom_op


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
    try:
        return _dispatcher()(f"llama_ops_{name}", *arguments)
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
