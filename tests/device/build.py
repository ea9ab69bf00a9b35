"""Builds the rehearsal device from csrc/ with g++: ``make device``, about a minute the first time.

Without a compiler one line says so, and the tests on the device are skipped.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
OBJECTS = HERE / "build" / "objects"
# Paddle loads every library of the folder that CUSTOM_DEVICE_ROOT names.
PLUGIN = HERE / "build" / "plugin"
LIBRARY = PLUGIN / "librehearsal.so"
DEFINES = ("-DPADDLE_WITH_CUSTOM_KERNEL", "-DPADDLE_WITH_CUSTOM_DEVICE")
COMPILE = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wno-unused", *DEFINES)
LIBRARIES = ("-l:libpaddle.so", "-l:libphi_core.so", "-l:libphi.so", "-l:libcommon.so")


def _paddle() -> Path:
    found = importlib.util.find_spec("paddle")
    if found is None or found.origin is None:
        sys.exit("error: no paddle in this environment; `make setup` makes one")
    return Path(found.origin).parent


def _stamp(paddle: Path, source: Path) -> str:
    """What an object file was made from: its source, all headers, the flags and Paddle."""
    version = (paddle / "version" / "__init__.py").read_bytes()
    headers = [file.read_bytes() for file in sorted(SOURCES.glob("*.h"))]
    parts = [source.read_bytes(), *headers, version, " ".join(COMPILE).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_current() -> bool:
    """Return whether the library was made from the sources that lie here."""
    paddle = _paddle()
    stamps = (OBJECTS / f"{source.stem}.stamp" for source in SOURCES.glob("*.cc"))
    made = {stamp.stem: stamp.read_text() for stamp in stamps if stamp.is_file()}
    wanted = {source.stem: _stamp(paddle, source) for source in SOURCES.glob("*.cc")}
    return LIBRARY.is_file() and made == wanted


def build() -> None:
    """Compile what has changed, one file after another, and link it.

    Raises:
        SystemExit: the compiler refused; its message was printed.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        print(f"no {compiler}: the rehearsal device is not built, tests on it will be skipped")
        return
    paddle = _paddle()
    include = [f"-I{paddle / 'include'}", f"-I{paddle / 'include' / 'third_party'}"]
    OBJECTS.mkdir(parents=True, exist_ok=True)
    PLUGIN.mkdir(parents=True, exist_ok=True)
    for source in sorted(SOURCES.glob("*.cc")):
        target = OBJECTS / f"{source.stem}.o"
        stamp, wanted = target.with_suffix(".stamp"), _stamp(paddle, source)
        if target.is_file() and stamp.is_file() and stamp.read_text() == wanted:
            continue
        _run([compiler, *COMPILE, *include, "-c", str(source), "-o", str(target)])
        stamp.write_text(wanted)
    objects = [str(OBJECTS / f"{source.stem}.o") for source in sorted(SOURCES.glob("*.cc"))]
    folders = [f"-L{paddle / 'base'}", f"-L{paddle / 'libs'}"]
    draft = OBJECTS / LIBRARY.name
    _run([compiler, "-shared", "-o", str(draft), *objects, *folders, *LIBRARIES])
    draft.replace(LIBRARY)  # a process that has loaded the old one keeps it


def _run(command: list[str]) -> None:
    done = subprocess.run(["nice", *command], check=False)
    if done.returncode:
        sys.exit(f"error: {command[0]} failed with exit status {done.returncode}")


if __name__ == "__main__":
    build()
