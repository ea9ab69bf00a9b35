"""Fills an environment for a kind of device: ``make setup DEVICE=gpu CUDA=126``, or npu, xpu, dcu.

Everything but Paddle comes from PyPI as for CPUs, pinned by ``constraints.txt``. Paddle's wheel is
of Paddle's own index and takes the place of the CPU wheel, or, where it is a plug-in, lies beside
it. What another device needed is removed first: two wheels of Paddle write into one folder, and the
last one installed would win. The constraints that held are left in the environment. The kind is
remembered there too, so that a later ``make`` without DEVICE keeps it.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from common.devices import CPU, GPU, KINDS, Kind
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CUDA = ("118", "126", "129", "130")  # what Paddle 3.3 was built for
REMEMBERED = "device.txt"
_CPU_WHEEL = "paddlepaddle"
_PIN = re.compile(rf"^{_CPU_WHEEL}\s*==.*$", re.M)


def check(device: str, cuda: str | None) -> None:
    """Refuse kinds whose wheels nobody knows, and versions of CUDA that Paddle has none for.

    Raises:
        UserError: names what there is.
    """
    if device != CPU and device not in KINDS:
        raise UserError(f"DEVICE={device} is not one of {', '.join((CPU, *KINDS))}")
    if cuda is not None and device != GPU:
        raise UserError(f"CUDA={cuda} is of GPUs, and DEVICE={device}; drop CUDA")
    if cuda is not None and cuda not in CUDA:
        raise UserError(f"CUDA={cuda} is not one of {', '.join(CUDA)}: Paddle has no other wheels")


def kind_for(device: str, cuda: str | None) -> Kind | None:
    """Return what has to be installed; None for the CPU wheel alone."""
    if device == CPU:
        return None
    known = KINDS[device]
    folder = f"cu{cuda}" if cuda else known.folder
    return Kind(known.what, known.wheel, known.version, folder)


def constraints(kind: Kind | None, pins: str) -> str:
    """Return the text of ``constraints.txt`` with the pin of Paddle that a kind needs.

    Args:
        kind: of :func:`kind_for`.
        pins: the text for CPUs.
    """
    if kind is None:
        return pins
    wanted = kind.paddle if not kind.is_plugin else f"{kind.paddle}\n{kind.wheel}=={kind.version}"
    assert _PIN.search(pins), "constraints.txt does not pin paddlepaddle"
    return _PIN.sub(wanted, pins)


def requirements(kind: Kind | None, lines: str) -> str:
    """Return the text of ``requirements.txt`` without the CPU wheel where a kind replaces it."""
    if kind is None or kind.is_plugin:
        return lines
    return re.sub(rf"^{_CPU_WHEEL}\b.*\n", "", lines, flags=re.M)


def superfluous(kind: Kind | None) -> list[str]:
    """Return the wheels of Paddle and its plug-ins that lie here and do not belong to a kind."""
    belong = {_CPU_WHEEL} if kind is None else {kind.wheel}
    if kind is not None and kind.is_plugin:
        belong.add(_CPU_WHEEL)
    known = [_CPU_WHEEL, *(one.wheel for one in KINDS.values())]
    here = {str(found.name).lower().replace("_", "-") for found in metadata.distributions()}
    return [wheel for wheel in known if wheel in here and wheel not in belong]


def commands(kind: Kind | None, index: str | None, removed: Sequence[str]) -> list[list[str]]:
    """Return what pip is asked for, in this order.

    Args:
        kind: of :func:`kind_for`.
        index: in place of Paddle's own.
        removed: of :func:`superfluous`.
    """
    pinned = ["-c", "{environment}/constraints.txt"]
    steps = [["uninstall", "--yes", *removed]] if removed else []
    steps.append(["install", "--prefer-binary", "-r", "{environment}/requirements.txt", *pinned])
    if kind is not None:
        wheel = f"{kind.wheel}=={kind.version}"
        # Paddle's index alone: PyPI has other wheels under these names, of other versions.
        steps.append(["install", wheel, "-i", index or kind.index, *pinned])
    return steps


def install(
    device: str, cuda: str | None, index: str | None, options: list[str], dry: bool
) -> None:
    """Fill this interpreter's environment, or only say what would be done.

    Raises:
        UserError: a step of pip failed, or another wheel of Paddle is left.
    """
    kind, environment = kind_for(device, cuda), Path(sys.prefix)
    for step in commands(kind, index, superfluous(kind)):
        words = [word.format(environment=environment) for word in step]
        if dry:
            print("pip", *words)
            continue
        for name, change in (("requirements", requirements), ("constraints", constraints)):
            text = (ROOT / f"{name}.txt").read_text(encoding="utf-8")
            (environment / f"{name}.txt").write_text(change(kind, text), encoding="utf-8")
        if subprocess.run([sys.executable, "-m", "pip", *words, *options], check=False).returncode:
            raise UserError(f"`pip {' '.join(words)}` failed; what it said is above")
    if dry:
        return
    if left := superfluous(kind):
        raise UserError(f"{', '.join(left)} came back, which {device} must not have beside it")
    (environment / REMEMBERED).write_text(f"{device} {cuda or ''}".strip(), encoding="utf-8")


def main() -> None:
    """Read the command line; fill the environment of the interpreter that runs this."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="", help="cpu, " + ", ".join(KINDS))
    parser.add_argument("--cuda", default="", help=f"{', '.join(CUDA)}; of DEVICE=gpu")
    parser.add_argument("--index", help="package index in place of Paddle's")
    parser.add_argument("--dry_run", action="store_true", help="only print what pip would be asked")
    given, options = parser.parse_known_args()
    remembered = Path(sys.prefix) / REMEMBERED
    device, cuda = given.device, given.cuda
    if not device and remembered.is_file():
        device, _, cuda = remembered.read_text(encoding="utf-8").partition(" ")
    try:
        check(device or CPU, cuda or None)
        install(device or CPU, cuda or None, given.index, options, given.dry_run)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
