"""Builds the native kernels: ``pip install ./external_ops`` or ``python setup.py install``.

Every kernel in csrc/cpu is compiled once per instruction set, into one library with its Paddle
operators; which copy runs is decided on the machine that runs it. Objects are kept in build/ and
made again when a source or header is newer. CXX chooses the compiler, MAX_JOBS how many run at a
time.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"
NAME = "llama_paddle_ops"

FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
]
AVX512 = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mfma",
    "-mf16c",
    "-mprefer-vector-width=512",
]
LEVELS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "emulated": [*AVX512, "-DLLAMA_OPS_EMULATE"],
}
SHARED = ("entries", "scratch")  # compiled once
BF16 = ("linear", "decoder")  # compiled for the last two levels too


def digest() -> str:
    """Return a digest of all sources, by which a stale build is recognised."""
    files = sorted(f for f in CSRC.rglob("*") if f.suffix in {".h", ".cc", ".cu", ".cuh"})
    whole = hashlib.sha256()
    for file in [HERE / "setup.py", *files]:
        whole.update(file.relative_to(HERE).as_posix().encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()


def find_paddle() -> tuple[Path, str]:
    """Return the directory and version of the Paddle that will load the operators."""
    code = (
        "import importlib.util as u, importlib.metadata as m, json; s = u.find_spec('paddle'); "
        "n = [d for d in ('paddlepaddle', 'paddlepaddle-gpu') if s and list(m.Distribution"
        ".discover(name=d))]; "
        "print(json.dumps([s.submodule_search_locations[0], m.version(n[0])] if n else None))"
    )
    # pip builds in an environment without Paddle; -I leaves that and looks into the target's.
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    found = json.loads(done.stdout or "null")
    if found is None:
        raise CompileError("paddlepaddle is not installed in this environment; install it first")
    return Path(found[0]), found[1]


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    source: Path
    target: Path
    flags: list[str]

    @property
    def listing(self) -> Path:
        """Where the compiler lists the files that it read."""
        return self.target.with_suffix(".d")

    def stale(self) -> bool:
        """Tell whether the object is missing or older than a file that it was made from."""
        if not self.target.exists() or not self.listing.exists():
            return True
        made = self.target.stat().st_mtime
        read = self.listing.read_text(encoding="utf-8").partition(":")[2].replace("\\\n", " ")
        return any(not Path(f).exists() or Path(f).stat().st_mtime > made for f in read.split())


def kernel_units(temporary: Path) -> list[Unit]:
    """Return the compilations of csrc/cpu."""
    units = []
    for source in sorted((CSRC / "cpu").glob("*.cc")):
        levels = list(LEVELS) if source.stem in BF16 else list(LEVELS)[:3]
        if source.stem in SHARED:
            units.append(Unit(source, temporary / f"{source.stem}.o", []))
            continue
        for level in levels:
            flags = ["-fno-exceptions", *LEVELS[level], f"-DLLAMA_OPS_LEVEL={level}"]
            units.append(Unit(source, temporary / f"{source.stem}.{level}.o", flags))
    return units


def paddle_units(temporary: Path, paddle: Path) -> list[Unit]:
    """Return the compilations of csrc/paddle."""
    includes = [paddle / "include", paddle / "include" / "third_party"]
    includes.append(Path(sysconfig.get_paths()["include"]))
    flags = ["-DPADDLE_WITH_CUSTOM_KERNEL", "-w", *(f"-isystem{path}" for path in includes)]
    sources = sorted((CSRC / "paddle").glob("*.cc"))
    return [Unit(one, temporary / f"paddle_{one.stem}.o", flags) for one in sources]


def compile_all(units: list[Unit]) -> None:
    """Compile what is stale, several at a time."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CompileError(f"no C++ compiler {compiler!r}; install g++, or set CXX")

    def one(unit: Unit) -> None:
        unit.target.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, *FLAGS, *unit.flags, f"-I{CSRC}", f"-I{CSRC / 'include'}"]
        command += ["-MMD", "-MF", str(unit.listing), "-c", str(unit.source)]
        done = subprocess.run([*command, "-o", str(unit.target)], check=False)
        if done.returncode:
            unit.target.unlink(missing_ok=True)
            raise CompileError(f"{unit.source.relative_to(HERE)} did not compile")

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        list(pool.map(one, [unit for unit in units if unit.stale()]))


def check_levels(units: list[Unit]) -> None:
    """Refuse level objects with symbols of which the linker keeps one for all levels."""
    for unit in units:
        if unit.source.stem in SHARED:
            continue
        listed = subprocess.run(
            ["nm", "-C", "--defined-only", str(unit.target)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = [line.split(maxsplit=2) for line in listed.splitlines()]
        level = unit.target.suffixes[-2][1:]
        shared = [n[2] for n in names if n[1] in "WVu" and f"llama_ops::{level}::" not in n[2]]
        if shared:
            raise CompileError(f"{unit.target.name} defines {shared[0]}, which all levels share")


class BuildOps(build_ext):
    """Compiles and links the library."""

    def run(self) -> None:
        """Build into the package directory of the distribution being made."""
        paddle, version = find_paddle()
        temporary = HERE / "build" / "objects"
        kernels = kernel_units(temporary)
        units = [*kernels, *paddle_units(temporary, paddle)]
        compile_all(units)
        check_levels(kernels)
        package = (HERE if self.inplace else Path(self.build_lib)) / NAME
        package.mkdir(parents=True, exist_ok=True)
        library, new = package / f"{NAME}.so", package / f".{NAME}.so"
        libs = paddle / "libs"
        # Paddle's own OpenMP library: a second one in the process would fight it for the cores.
        command = [os.environ.get("CXX", "g++"), "-shared", *(str(unit.target) for unit in units)]
        command += ["-o", str(new), f"-L{libs}", "-l:libiomp5.so", f"-L{paddle / 'base'}"]
        command += ["-l:libpaddle.so", f"-Wl,-rpath,{libs}"]
        subprocess.run(command, check=True)
        new.replace(library)
        info = {"sources": digest(), "paddle": version, "cuda": []}
        (package / "build_info.json").write_text(json.dumps(info), encoding="utf-8")


setup(
    name="llama-paddle-ops",
    version="0.1.0",
    description="Native kernels of the Llama suite as Paddle custom operators",
    packages=[NAME],
    ext_modules=[Extension(f"{NAME}.library", [])],
    cmdclass={"build_ext": BuildOps},
    python_requires=">=3.11",
    zip_safe=False,
)
