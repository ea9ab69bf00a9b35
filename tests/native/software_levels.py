"""The native ops with the levels of AVX-512 in software, for processors that lack it.

``python tests/native/software_levels.py DIRECTORY`` builds the package ``llama_paddle_ops`` there.
With DIRECTORY in ``PYTHONPATH``, tests then run the levels ``avx512`` and ``emulated`` as well:
their sums, in their order, by software_avx512.h.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from external_ops import building

NAME = "llama_paddle_ops"
# What is optimised further compiles for many minutes. Mask constants that nothing reads here;
# registers that GCC 12 thinks are not initialised.
FLAGS = ("-O1", "-Wno-unused-variable", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
SOFTWARE = (*building.LEVELS["avx2"], *FLAGS, "-include", str(HERE / "software_avx512.h"))
LEVELS = {"avx512": SOFTWARE, "emulated": (*SOFTWARE, "-DLLAMA_OPS_EMULATE")}


def _trusting(one: building.Unit) -> building.Unit:
    """Return a compilation after which the processor has all that the dispatcher asks it for."""
    if one.source.stem != "entries":
        return one
    return replace(one, command=(*one.command, "-D__builtin_cpu_supports(NAME)=1"))


def build(directory: Path) -> None:
    """Compile what is stale, and link; operators are those of the checkout's own build.

    Raises:
        building.BuildError: what the compiler said.
    """
    package = directory / NAME
    package.mkdir(parents=True, exist_ok=True)
    for source in (building.HERE / NAME).glob("*.py"):
        shutil.copy(source, package)
    building.LEVELS.update(LEVELS)
    os.environ["LLAMA_OPS_LEVELS"] = ",".join(LEVELS)
    paddle, sources = building.Paddle.find(), building.digest()
    kernels = [_trusting(one) for one in building.kernel_units(directory / "objects")]
    units = [*kernels, *building.paddle_units(building.OBJECTS, paddle, None)]
    building.compile_all(units)
    building.check_levels(kernels)
    building.link(units, paddle, None, package / f"{NAME}.so")
    building.write_record(package, sources, paddle, None, [])


def main() -> int:
    """Build into the directory that is named; the status is 1, with one message, where it fails."""
    try:
        build(Path(sys.argv[1]).resolve())
    except building.BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
