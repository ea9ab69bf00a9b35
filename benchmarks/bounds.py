"""What this machine can do at most: reading, copying and multiplying, by native code.

    python benchmarks/bounds.py [--threads N]

The functions are in the library of the native ops (csrc/include/llama_ops/measure.h), so they run
on the same threads; other benchmarks measure them in the same turns as what they bound.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from interleave import serve
from record import ROOT, environment, median

# Far beyond any cache.
BYTES = 256 << 20
_FMA_ROUNDS = 2_000_000


class _Read(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("sum", ctypes.c_void_p),
        ("ahead", ctypes.c_int),
    )


class _Copy(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("streaming", ctypes.c_int),
    )


class _FMA(ctypes.Structure):
    _fields_ = (
        ("rounds", ctypes.c_int64),
        ("result", ctypes.c_void_p),
        ("operations", ctypes.c_void_p),
    )


def _aligned(size: int) -> Any:
    """Return bytes at a multiple of 64, all of them in memory."""
    import numpy as np

    whole = np.ones(size + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size]


class Bounds:
    """The machine's limits; needs the native ops."""

    def __init__(self) -> None:
        from external_ops import native

        self._library = native.library()
        self._source, self._target = _aligned(BYTES), _aligned(BYTES)
        self._out = _aligned(64)

    def _seconds(self, name: str, arguments: ctypes.Structure) -> float:
        start = time.perf_counter()
        getattr(self._library, f"llama_ops_measure_{name}")(ctypes.byref(arguments))
        return time.perf_counter() - start

    def read(self) -> float:
        """Return bytes read per second, in the faster of two ways."""
        ends = (self._source.ctypes.data, BYTES, self._out.ctypes.data)
        return BYTES / min(self._seconds("read", _Read(*ends, ahead)) for ahead in (0, 1))

    def copy(self) -> float:
        """Return bytes read and written per second, with the faster kind of store."""
        ends = (self._source.ctypes.data, self._target.ctypes.data, BYTES)
        return 2 * BYTES / min(self._seconds("copy", _Copy(*ends, kind)) for kind in (0, 1))

    def multiply(self) -> float:
        """Return float32 multiplications and additions per second."""
        address = self._out.ctypes.data
        seconds = self._seconds("fma", _FMA(_FMA_ROUNDS, address, address + 8))
        return int(self._out[8:16].view("int64")[0]) / seconds

    def cases(self) -> dict[str, Callable[[], float]]:
        """Return the measurements by name."""
        return {"read": self.read, "copy": self.copy, "multiply": self.multiply}


def load_paddle(threads: int) -> None:
    """Load Paddle, whose threads the native ops use."""
    sys.path.insert(0, str(ROOT))
    from llm import runtime

    runtime.prepare(threads)
    runtime.load_paddle()


def command(threads: int) -> list[str]:
    """Return the command of a worker whose cases are the measurements."""
    return [sys.executable, __file__, "--serve", "--threads", str(threads)]


def main() -> None:
    """Measure and print, or be a worker."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    load_paddle(options.threads)
    bounds = Bounds()
    if options.serve:
        serve(lambda case: bounds.cases()[case])
        return
    units = {"read": "GB/s", "copy": "GB/s", "multiply": "GFLOP/s"}
    for name, case in bounds.cases().items():
        print(f"{name:9} {median([case() for _ in range(9)]) / 1e9:7.1f} {units[name]}")
    print(json.dumps({"threads": options.threads, **environment()}))


if __name__ == "__main__":
    main()
