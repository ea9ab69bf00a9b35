"""Native kernels of the Llama suite as Paddle custom operators.

Holds the compiled library and what is known of how it was made; ``external_ops.native`` calls it.
``python -m llama_paddle_ops`` says what is there and runs every operator once.
"""

import ctypes
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
LIBRARY = _HERE / "llama_paddle_ops.so"
_AGAIN = "build it again: pip install ./external_ops, or make ops"


def build_info() -> dict[str, Any]:
    """Return the digest of the sources, compiler, Paddle version, levels and GPU architectures."""
    return json.loads((_HERE / "build_info.json").read_text(encoding="utf-8"))


def misfit() -> str:
    """Return why the library cannot be loaded here, or an empty string."""
    import paddle

    if not LIBRARY.exists() or not (_HERE / "build_info.json").exists():
        return f"the package llama_paddle_ops has no library; {_AGAIN}"
    built_for = build_info()["paddle"]
    if built_for != paddle.__version__:
        return f"the native ops are for Paddle {built_for}, this is {paddle.__version__}; {_AGAIN}"
    return ""


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Register the operators with Paddle, once; return the C interface (csrc/include).

    Raises:
        RuntimeError: the library does not fit this Paddle, or a symbol that it needs is missing.
    """
    if why := misfit():
        raise RuntimeError(why)
    from paddle.utils.cpp_extension import extension_utils

    extension_utils.load_op_meta_info_and_register_op(str(LIBRARY))
    return ctypes.CDLL(str(LIBRARY))
