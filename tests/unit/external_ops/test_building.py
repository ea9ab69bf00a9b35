"""How the native ops are built, and what is held about them without building anything large."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from external_ops import backend, building, native
from tests.native import compile_cuda

REPO = Path(__file__).resolve().parents[3]
HEADERS = sorted((building.CSRC / "include" / "llama_ops").glob("*.h"))


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.stem)
def test_headers_are_plain_c(header):
    """Anything that can call C can use the kernels: structs of plain fields, no C++, no Paddle."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", "-x", "c"]
    command = [compiler, *flags, f"-I{building.CSRC / 'include'}", str(header)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_kernel_of_the_headers_is_in_the_library(native_ops):
    names = set()
    for header in HEADERS:
        if header.stem != "cuda":
            text = header.read_text(encoding="utf-8")
            names |= set(re.findall(r"LLAMA_OPS_API\s+[\w ]+?[ *\n](llama_ops_\w+)\(", text))
    assert len(names) > 10
    assert [name for name in sorted(names) if not hasattr(native.library(), name)] == []


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("", list(building.LEVELS)),
        ("avx2", ["portable", "avx2"]),
        ("portable;emulated", ["portable", "avx512", "emulated"]),
        ("portable, avx512", ["portable", "avx512"]),
    ],
)
def test_levels_follow_the_environment(asked, found, monkeypatch):
    monkeypatch.setattr(building.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("LLAMA_OPS_LEVELS", asked)
    assert building.levels() == found


def test_other_processors_get_portable_kernels(monkeypatch):
    monkeypatch.setattr(building.platform, "machine", lambda: "aarch64")
    assert building.levels() == ["portable"]
    monkeypatch.setenv("LLAMA_OPS_LEVELS", "avx2")
    with pytest.raises(building.BuildError, match="'avx2' is not one of portable"):
        building.levels()


@pytest.mark.parametrize(
    ("ours", "paddles", "found"),
    [
        (None, None, ["80", "90"]),
        ("86", "8.0", ["86"]),
        (None, "8.0;9.0+PTX 9.0a", ["80", "90", "90a"]),
        ("100,120", None, ["100", "120"]),
    ],
)
def test_gpu_architectures_follow_the_environment(ours, paddles, found, monkeypatch):
    for name, value in (("LLAMA_OPS_CUDA_ARCHS", ours), ("PADDLE_CUDA_ARCH_LIST", paddles)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert building.cuda_archs() == found


@pytest.mark.parametrize(
    ("archs", "ptx"),
    [
        (["80", "90"], ["compute_90"]),
        (["120", "90", "90a"], ["compute_120"]),
        (["100f"], []),
    ],
)
def test_newer_gpus_find_ptx(archs, ptx, tmp_path):
    """Machine code is for one generation; PTX is compiled by the driver of any later one."""
    for unit in building.cuda_units(tmp_path, "nvcc", archs):
        codes = [word.rpartition("code=")[2] for word in unit.command if "gencode" in word]
        assert codes == [*(f"sm_{arch}" for arch in archs), *ptx]


@pytest.fixture
def cuda_tree(tmp_path, monkeypatch):
    """``cuda_tree(folder)``: a compiler on the PATH, and a toolkit elsewhere with its runtime."""
    building.toolkit.cache_clear()
    root, path = tmp_path / "cuda-x", tmp_path / "bin"
    path.mkdir()

    def make(folder, *, script=True):
        archive = root / folder / "libcudart_static.a"
        archive.parent.mkdir(parents=True)
        real = root / "bin" / "nvcc"
        real.parent.mkdir()
        says = f'echo "#\\$ TOP={root}/bin/.." >&2' if script else "exit 1"
        real.write_text(f"#!/bin/sh\n{says}\n", "utf-8")
        real.chmod(0o755)
        if script:
            (path / "nvcc").write_text(f'#!/bin/sh\nexec {real} "$@"\n', "utf-8")
            (path / "nvcc").chmod(0o755)
        else:
            (path / "nvcc").symlink_to(real)
        monkeypatch.setenv("PATH", f"{path}:{building.os.environ['PATH']}")
        return archive

    yield make
    building.toolkit.cache_clear()


@pytest.mark.parametrize("script", [True, False], ids=["script", "link"])
@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/{}-linux/lib"])
def test_the_cuda_runtime_is_found_however_it_was_packed(tmp_path, cuda_tree, folder, script):
    """NVIDIA's installer, pip and conda, and nvcc's own target folders; linked for real."""
    if shutil.which("g++") is None or shutil.which("ar") is None:
        pytest.skip("no g++")
    archive = cuda_tree(folder.format(building.platform.machine()), script=script)

    def compiled_to(target, code, *flags):
        source = tmp_path / f"{target.name}.cc"
        source.write_text(code, "utf-8")
        command = ["g++", *flags, str(source), "-fPIC", "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    runtime = compiled_to(tmp_path / "runtime.o", "int cudaFree() { return 7; }", "-c")
    subprocess.run(["ar", "rcs", str(archive), str(runtime)], check=True)
    paddle = building.Paddle(tmp_path / "paddle", "0", True)
    for name in ("base", "libs"):
        (paddle.directory / name).mkdir(parents=True)
    compiled_to(paddle.directory / "base" / "libpaddle.so", "int paddle() { return 1; }", "-shared")
    code = 'int cudaFree(); extern "C" int op() { return cudaFree(); }'
    unit = building.Unit(tmp_path, compiled_to(tmp_path / "op.o", code, "-c"), ())
    building.link([unit], paddle, "nvcc", tmp_path / "out" / "ops.so")
    assert ctypes.CDLL(str(tmp_path / "out" / "ops.so")).op() == 7


def test_operators_for_cpus_stay_where_those_for_gpus_do_not_link(tmp_path, monkeypatch, capsys):
    made = []

    def link(_, __, nvcc, library):
        made.append(nvcc)
        if nvcc is not None:
            raise building.BuildError("the library did not link:\ncannot find -lcudart_static")

    paddle = building.Paddle(tmp_path, "3.3.1", True)
    monkeypatch.setattr(building.Paddle, "find", lambda: paddle)
    monkeypatch.setattr(building, "OBJECTS", tmp_path / "objects")
    for name in ("kernel_units", "paddle_units", "cuda_units"):
        monkeypatch.setattr(building, name, lambda *_: [])
    monkeypatch.setattr(building, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(building, "_version", lambda _: "some version")
    monkeypatch.setattr(building, "link", link)
    building.build(tmp_path, "ops")
    assert made == ["nvcc", None]
    info = json.loads((tmp_path / "build_info.json").read_text("utf-8"))
    assert info["cuda"] == [] and info["nvcc"] is None
    said = capsys.readouterr().err
    assert "the operators for GPUs are left out: the library did not link" in said
    monkeypatch.setattr(building.Paddle, "find", lambda: building.Paddle(tmp_path, "3", False))
    building.build(tmp_path, "ops")
    assert made == ["nvcc", None, None]


@pytest.mark.parametrize("wrong", ["75", "7.5", "ninety"])
def test_old_gpus_are_refused(wrong, monkeypatch):
    monkeypatch.setenv("LLAMA_OPS_CUDA_ARCHS", wrong)
    with pytest.raises(building.BuildError, match=f"'{wrong}': the kernels need 80"):
        building.cuda_archs()


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(building.BuildError) as refused:
        building.cxx()
    assert str(refused.value) == "no C++ compiler 'no-such-compiler'; install g++, or set CXX"


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compile a file of level code; return the unit."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    monkeypatch.delenv("CXX", raising=False)

    def make(code, *flags):
        source = tmp_path / "some.cc"
        source.write_text(code, "utf-8")
        unit = building.unit(source, tmp_path / "some.avx2.o", ["-std=c++17", *flags])
        building.compile_all([unit])
        return unit

    return make


def test_objects_are_made_again_when_sources_or_flags_change(compiled):
    unit = compiled("int number() { return 1; }\n")
    assert not unit.stale()
    assert compiled("int number() { return 1; }\n", "-DMORE").record != "" and unit.stale()
    unit = compiled("int number() { return 2; }\n")
    unit.source.touch()
    assert unit.stale()


def test_compile_errors_are_short(compiled):
    with pytest.raises(building.BuildError) as refused:
        compiled("int number() { return nothing; }\n")
    first, second, *_ = str(refused.value).splitlines()
    assert first.endswith("some.cc did not compile:")
    assert "error" in second and "nothing" in second


def test_code_that_levels_would_share_is_refused(compiled):
    building.check_levels([compiled("namespace llama_ops::avx2 { inline int f() { return 1; }\n}")])
    shared = "inline int f() { return 1; }\nint (*used())() { return f; }\n"
    with pytest.raises(building.BuildError, match=r"some.avx2.o defines f\(\), which all levels"):
        building.check_levels([compiled(shared)])


def test_other_sources_are_noticed(monkeypatch, caplog):
    monkeypatch.setattr(native._log, "propagate", True)
    monkeypatch.setattr(native.logging.getLogger("external_ops"), "propagate", True)
    native._warn_of_surprises({"sources": building.digest()}, "avx2")
    assert not caplog.records
    native._warn_of_surprises({"sources": "others"}, "avx2")
    assert [r.getMessage() for r in caplog.records] == [
        "the native ops were built from other sources than these; make ops"
    ]
    monkeypatch.setenv("LLAMA_OPS_LEVEL", "avx3")
    caplog.clear()
    native._warn_of_surprises({"sources": building.digest()}, "avx2")
    assert "LLAMA_OPS_LEVEL=avx3 is not there; the level is avx2" in caplog.text


def test_spills_are_read_from_ptxas():
    said = """ptxas info    : Compiling entry function '_Z1a' for 'sm_80'
ptxas info    : Function properties for _Z1a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z1b' for 'sm_90'
ptxas info    : Function properties for _Z1b
    16 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
"""
    assert compile_cuda.spills(said) == ["_Z1b for sm_90 spills 12 bytes"]


def test_every_operator_has_a_check():
    from external_ops.llama_paddle_ops.checks import ALSO, CHECKS

    built = building.ops()
    assert len(built) > 10
    assert [name for name in built if name not in CHECKS and name not in ALSO] == []
    assert set(CHECKS) | set(ALSO) == set(built)


def test_the_self_check_runs_every_operator_at_every_level(native_ops, repo):
    command = [sys.executable, "-m", "llama_paddle_ops"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    from llama_paddle_ops.checks import CHECKS

    for op in CHECKS:
        levels = [words[1] for words in lines if words[0] == op and words[2] == "ok,"]
        assert levels == native.supported_levels(), op
    assert done.stdout.endswith("all operators work\n")
    taken = {choice.op: choice for choice in backend.select_ops(device="cpu").choices}
    table = [words for words in lines if len(words) > 3 and words[1] == taken["decoder"].form]
    assert {words[0]: words[2] for words in table} == {op: c.level for op, c in taken.items()}


def test_a_check_that_fails_is_seen(native_ops, monkeypatch):
    from llama_paddle_ops import __main__, checks

    def wrong(run):
        [(found, expected)] = checks.swiglu(run)
        return [(found, expected + np.eye(*expected.shape) * 1e-3)]

    def refused(run):
        return [(run("swiglu", np.ones([2, 3]), np.ones([2, 4]))[0], np.ones([2, 3]))]

    for check, begins in ((wrong, "FAILED, error "), (refused, "FAILED: llama_ops_swiglu: ")):
        monkeypatch.setitem(__main__.CHECKS, "swiglu", check)
        passed, said = __main__._check("swiglu")
        assert not passed and said.startswith(begins), said
