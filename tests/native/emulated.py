"""Builds the CUDA kernels of csrc/laboratory for the CPU, as C++ over cuda_emulator.h."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.native.cuda_interface import CudaOps
from tests.native.storage import NumpyArrays

REPO = Path(__file__).resolve().parents[2]
CSRC = REPO / "external_ops" / "csrc"
CUDA = CSRC / "laboratory" / "cuda"
HEADER = Path(__file__).resolve().parent / "cuda_emulator.h"
PROBE = HEADER.with_name("emulator_probe.cu")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]


def compiler() -> str | None:
    """Return the C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _digest() -> str:
    files = [HEADER, PROBE, *sorted(CUDA.glob("*")), *sorted(CSRC.glob("include/**/*.h"))]
    whole = hashlib.sha256(" ".join(FLAGS).encode())
    for file in files:
        whole.update(file.name.encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()[:16]


def build() -> Path:
    """Compile what has changed; return the library, kept in the directory for temporary files.

    Raises:
        RuntimeError: the compiler's messages.
    """
    directory = Path(tempfile.gettempdir()) / f"llama_ops_emulated_{os.getuid()}"
    library = directory / f"{_digest()}.so"
    if library.exists():
        return library
    directory.mkdir(exist_ok=True, mode=0o700)

    def one(source: Path, work: Path) -> Path:
        target = work / f"{source.stem}.o"
        include = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
        _run([*FLAGS, "-x", "c++", "-include", HEADER, *include, "-c", source, "-o", target])
        return target

    with tempfile.TemporaryDirectory(dir=directory) as work:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sources = [PROBE, *CUDA.glob("*.cu")]
            objects = list(pool.map(lambda source: one(source, Path(work)), sources))
        new = Path(work) / "new.so"
        _run(["-shared", *objects, "-o", new])
        new.replace(library)
    return library


def _run(arguments: list[str | Path]) -> None:
    command = [compiler() or "g++", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load() -> CudaOps:
    """Return the emulated kernels."""
    ops = CudaOps(str(build()), NumpyArrays())
    ops.library.emulator_conflicts.restype = ctypes.c_int64
    ops.library.emulator_seed.argtypes = [ctypes.c_uint64]
    return ops
