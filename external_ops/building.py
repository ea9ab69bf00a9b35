"""How csrc/ becomes a library: which files are compiled for what, by which commands.

Needs nothing beyond the standard library: setup.py runs it in pip's build environments, where
there is no Paddle. The environment chooses:

======================  =========================================================================
CXX                     C++ compiler (g++)
LLAMA_OPS_LEVELS        instruction sets to compile for, such as ``portable,avx2`` (all)
NVCC                    CUDA compiler (that of CUDA_HOME, or on the PATH)
LLAMA_OPS_CUDA_ARCHS    GPU architectures, such as ``80;90``; else those of PADDLE_CUDA_ARCH_LIST,
                        Paddle's own variable (``8.0;9.0``); else 80 and 90. The newest one's PTX
                        goes along, which newer GPUs compile
MAX_JOBS                compilations at a time (all cores)
======================  =========================================================================
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"
CUDA = CSRC / "laboratory" / "cuda"  # until a GPU has run them
OBJECTS = HERE / "build" / "objects"

FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"),
)
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    # GCC 12 sees uninitialised registers in its own headers.
    *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
)
LEVELS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512bf16", "-mavx512vnni"),
    "emulated": (*AVX512, "-DLLAMA_OPS_EMULATE"),
}
# Files compiled for the last two levels too.
BF16 = ("linear", "decoder")


class BuildError(Exception):
    """The library cannot be built; the message is one line that says what to do."""


def digest() -> str:
    """Return a digest of everything that the library is made from."""
    files = sorted(f for f in CSRC.rglob("*") if f.suffix in {".h", ".cc", ".cu", ".cuh"})
    whole = hashlib.sha256()
    for file in [HERE / "building.py", HERE / "setup.py", *files]:
        whole.update(file.relative_to(HERE).as_posix().encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()


def ops() -> list[str]:
    """Return the operators of csrc/paddle, without ``llama_ops_``."""
    texts = [file.read_text(encoding="utf-8") for file in sorted((CSRC / "paddle").glob("*.cc"))]
    return re.findall(r"^PD_BUILD_OP\(llama_ops_(\w+)\)", "\n".join(texts), re.MULTILINE)


@dataclass(frozen=True)
class Paddle:
    """The Paddle that will load the operators."""

    directory: Path
    version: str
    cuda: bool

    @classmethod
    def find(cls) -> "Paddle":
        """Look into the environment that is being installed into, without importing Paddle.

        Raises:
            BuildError: there is none.
        """
        code = (
            "import importlib.util as u, json; s = u.find_spec('paddle'); "
            "print(json.dumps(s and list(s.submodule_search_locations)))"
        )
        # pip builds in an environment without Paddle; -I leaves that and looks into the target's.
        command = [sys.executable, "-I", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout or "null")
        if not found:
            raise BuildError(
                "paddlepaddle is not installed in this environment; install it first (pip install "
                "-r requirements.txt -c constraints.txt)"
            )
        directory = Path(found[0])
        text = (directory / "version" / "__init__.py").read_text(encoding="utf-8")
        said = dict(re.findall(r"^(\w+)\s*=\s*'([^']*)'", text, re.MULTILINE))
        return cls(directory, said["full_version"], said.get("cuda_version", "False") != "False")

    @property
    def includes(self) -> list[str]:
        """Flags for its headers and Python's, whose warnings are not ours."""
        python = sysconfig.get_paths()["include"]
        own = self.directory / "include"
        return [f"-isystem{path}" for path in (own, own / "third_party", python)]


def cxx() -> str:
    """Return the C++ compiler.

    Raises:
        BuildError: there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler {compiler!r}; install g++, or set CXX")
    return compiler


def find_nvcc() -> str | None:
    """Return the CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (os.environ.get("NVCC"), "nvcc", f"{home}/bin/nvcc"):
        if candidate and shutil.which(candidate):
            return candidate
    return None


@lru_cache(maxsize=1)
def toolkit(nvcc: str) -> Path:
    """Return the root of the CUDA toolkit; a compiler on the PATH may be a link or a script."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(shutil.which(nvcc) or nvcc).resolve().parents[1]


def toolkit_folders(nvcc: str, *names: str) -> list[Path]:
    """Return the folders of the CUDA toolkit that there are; layouts differ by who packed it."""
    root = toolkit(nvcc)
    roots = (root, *sorted(root.glob(f"targets/{platform.machine()}-linux")))
    return [one / name for one in roots for name in names if (one / name).is_dir()]


def levels() -> list[str]:
    """Return the instruction sets to compile for.

    Raises:
        BuildError: LLAMA_OPS_LEVELS names another.
    """
    known = list(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]
    asked = re.split(r"[,; ]+", os.environ.get("LLAMA_OPS_LEVELS", "").strip())
    for name in filter(None, asked):
        if name not in known:
            raise BuildError(f"LLAMA_OPS_LEVELS: {name!r} is not one of {', '.join(known)}")
    if asked == [""]:
        return known
    # What is compiled for three levels only runs at the last two as avx512; portable runs anywhere.
    also = {"portable"} | ({"avx512"} if {"avx512_bf16", "emulated"} & set(asked) else set())
    return [name for name in known if name in also.union(asked)]


def cuda_archs() -> list[str]:
    """Return the GPU architectures to compile for, such as ``80`` and ``90a``.

    Raises:
        BuildError: one of them is older than 80, or no architecture at all.
    """
    asked = os.environ.get("LLAMA_OPS_CUDA_ARCHS") or os.environ.get("PADDLE_CUDA_ARCH_LIST")
    found = []
    for name in filter(None, re.split(r"[,; ]+", (asked or "80;90").strip())):
        arch = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            raise BuildError(f"CUDA architecture {name!r}: the kernels need 80 (8.0) or newer")
        found.append(arch)
    return found


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    source: Path
    target: Path
    command: tuple[str, ...]

    @property
    def listing(self) -> Path:
        """Where the compiler lists the files that it read."""
        return self.target.with_suffix(".d")

    @property
    def record(self) -> Path:
        """Where the command is kept that made the object."""
        return self.target.with_suffix(".command")

    def stale(self) -> bool:
        """Tell whether the object is missing, or made from older files or by another command."""
        if not (self.target.exists() and self.listing.exists() and self.record.exists()):
            return True
        if self.record.read_text(encoding="utf-8") != json.dumps(self.command):
            return True
        made = self.target.stat().st_mtime
        read = self.listing.read_text(encoding="utf-8").partition(":")[2].replace("\\\n", " ")
        return any(not Path(f).exists() or Path(f).stat().st_mtime > made for f in read.split())

    def compile(self) -> str:
        """Run the command; return the compiler's warnings.

        Raises:
            BuildError: with the compiler's first errors.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)
        started = time.time()
        done = subprocess.run(self.command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error:" in line]
            shown = "\n  ".join(errors[:5] or done.stderr.splitlines()[-5:])
            raise BuildError(f"{self.source} did not compile:\n  {shown}")
        os.utime(self.target, (started, started))  # sources may have changed meanwhile
        self.record.write_text(json.dumps(self.command), encoding="utf-8")
        return done.stdout + done.stderr


def unit(source: Path, target: Path, flags: Sequence[str]) -> Unit:
    """Return the compilation of a C++ file."""
    files = ("-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target))
    includes = (f"-I{CSRC}", f"-I{CSRC / 'include'}")
    return Unit(source, target, (cxx(), *FLAGS, *flags, *includes, *files))


def kernel_units(objects: Path, extra: Sequence[str] = ()) -> list[Unit]:
    """Return the compilations of csrc/cpu, one per file and level where a file is level code.

    Args:
        objects: where they go.
        extra: more flags.
    """
    chosen, units = levels(), []
    built = [f"-DLLAMA_OPS_BUILT_{level.upper()}" for level in chosen]
    for source in sorted((CSRC / "cpu").glob("*.cc")):
        if "namespace LLAMA_OPS_LEVEL" not in source.read_text(encoding="utf-8"):
            units.append(unit(source, objects / f"{source.stem}.o", [*built, *extra]))
            continue
        for level in chosen:
            if level in list(LEVELS)[:3] or source.stem in BF16:
                # Code that may throw defines symbols that levels would share.
                flags = [*LEVELS[level], "-fno-exceptions", f"-DLLAMA_OPS_LEVEL={level}", *extra]
                units.append(unit(source, objects / f"{source.stem}.{level}.o", flags))
    return units


def paddle_units(objects: Path, paddle: Paddle, nvcc: str | None) -> list[Unit]:
    """Return the compilations of csrc/paddle; files that end in _gpu only with CUDA."""
    flags = ["-DPADDLE_WITH_CUSTOM_KERNEL", "-w", *paddle.includes]
    if nvcc is not None:
        flags += ["-DPADDLE_WITH_CUDA", "-DLLAMA_OPS_WITH_CUDA"]
        # Thrust, which Paddle's headers include, lies one folder deeper from CUDA 13 on.
        folders = toolkit_folders(nvcc, "include", "include/cccl")
        flags += [f"-isystem{folder}" for folder in folders]
        flags.append(f"-isystem{paddle.directory / 'include/paddle/phi/api/include/compat'}")
    return [
        unit(source, objects / f"paddle_{source.stem}.o", flags)
        for source in sorted((CSRC / "paddle").glob("*.cc"))
        if nvcc is not None or not source.stem.endswith("_gpu")
    ]


def cuda_units(objects: Path, nvcc: str, archs: Sequence[str]) -> list[Unit]:
    """Return the compilations of the CUDA kernels: each architecture, and PTX for newer GPUs."""
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # That of architectures with a letter is for them alone.
    newest = max((int(arch) for arch in archs if arch.isdigit()), default=None)
    flags += [f"-gencode=arch=compute_{newest},code=compute_{newest}"] if newest else []
    flags += [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    units = []
    for source in sorted(CUDA.glob("*.cu")):
        target = objects / f"cuda_{source.stem}.o"
        files = ["-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
        units.append(Unit(source, target, (nvcc, *flags, *files)))
    return units


def compile_all(units: Sequence[Unit], done: Callable[[Unit, str], None] | None = None) -> None:
    """Compile what is stale, several at a time.

    Args:
        units: what to compile.
        done: called with each compilation and what the compiler said, in no order.

    Raises:
        BuildError: the first failure.
    """
    stale = [one for one in units if one.stale()]
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    finished = 0

    def run(one: Unit) -> None:
        nonlocal finished
        said = one.compile()
        finished += 1
        if done is not None:
            done(one, said)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r[{finished}/{len(stale)}] {one.target.name}\033[K")

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            list(pool.map(run, stale))
        finally:
            pool.shutdown(cancel_futures=True)
            if stale and sys.stderr.isatty():
                sys.stderr.write("\r\033[K")


def check_levels(units: Sequence[Unit]) -> None:
    """Refuse level objects with symbols of which the linker keeps one for all levels.

    Raises:
        BuildError: the copy that is kept might use instructions that a processor lacks.
    """
    for one in units:
        level = one.target.with_suffix("").suffix[1:]
        if level not in LEVELS:
            continue
        command = ["nm", "-C", "--defined-only", str(one.target)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = [line.split(maxsplit=2) for line in listed.splitlines()]
        shared = [n[2] for n in names if n[1] in "WVu" and f"llama_ops::{level}::" not in n[2]]
        if shared:
            raise BuildError(f"{one.target.name} defines {shared[0]}, which all levels share")


@contextmanager
def _one_at_a_time(objects: Path) -> Iterator[None]:
    objects.mkdir(parents=True, exist_ok=True)
    with (objects / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(package: Path, name: str) -> None:
    """Build the library into a package directory, with a record of how.

    Args:
        package: where ``NAME.so`` and ``build_info.json`` go.
        name: of the library.

    Raises:
        BuildError: no compiler, no Paddle, or what the compiler said.
    """
    paddle, nvcc = Paddle.find(), find_nvcc()
    if paddle.cuda and nvcc is None:
        sys.stderr.write("no nvcc: the operators for GPUs are left out; set CUDA_HOME or NVCC\n")
    archs = cuda_archs() if paddle.cuda and nvcc is not None else []
    library = package / f"{name}.so"
    with _one_at_a_time(OBJECTS):
        before = digest()
        try:
            _make(paddle, nvcc if archs else None, archs, library)
        except BuildError as error:
            if not archs:
                raise
            sys.stderr.write(f"the operators for GPUs are left out: {error}\n")
            archs = []
            _make(paddle, None, archs, library)
        write_record(package, before, paddle, nvcc if archs else None, archs)


def write_record(
    package: Path, sources: str, paddle: Paddle, nvcc: str | None, archs: Sequence[str]
) -> None:
    """Write down beside a library what it was made of; ``sources`` is their :func:`digest`."""
    info = {
        "sources": sources,
        "paddle": paddle.version,
        "compiler": _version(cxx()),
        "levels": levels(),
        "ops": ops(),
        "cuda": archs,
        "nvcc": None if nvcc is None else _version(nvcc),
    }
    (package / "build_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def _make(paddle: Paddle, nvcc: str | None, archs: Sequence[str], library: Path) -> None:
    """Compile and link, with kernels for GPUs where there is a compiler of theirs."""
    kernels = kernel_units(OBJECTS)
    units = [*kernels, *paddle_units(OBJECTS, paddle, nvcc)]
    units += [] if nvcc is None else cuda_units(OBJECTS, nvcc, archs)
    compile_all(units, lambda one, said: _show(said) if one.command[0] != nvcc else None)
    check_levels(kernels)
    link(units, paddle, nvcc, library)


def _show(said: str) -> None:
    if said.strip():
        sys.stderr.write(said)


def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next((line for line in said if "release" in line), said[0])


def link(units: Sequence[Unit], paddle: Paddle, nvcc: str | None, library: Path) -> None:
    """Link objects with Paddle's own OpenMP: a second one would fight it for the cores."""
    library.parent.mkdir(parents=True, exist_ok=True)
    new, libs = library.with_name(f".{library.name}"), paddle.directory / "libs"
    command = [cxx(), "-shared", *(str(one.target) for one in units), "-o", str(new)]
    openmp = "-l:libiomp5.so" if (libs / "libiomp5.so").exists() else "-fopenmp"
    command += [f"-L{libs}", openmp, f"-L{paddle.directory / 'base'}", "-l:libpaddle.so"]
    command += [f"-Wl,-rpath,{libs}"]
    if nvcc is not None:
        command += [f"-L{folder}" for folder in toolkit_folders(nvcc, "lib64", "lib")]
        command += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        new.unlink(missing_ok=True)
        raise BuildError("the library did not link:\n" + done.stderr[-1500:])
    new.replace(library)
