"""Compiles the CUDA kernels for every architecture and refuses registers that spill to memory.

python tests/native/compile_cuda.py; one line and success where there is no nvcc.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from external_ops import building

_KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes spill stores", re.DOTALL
)


def spills(said: str) -> list[str]:
    """Return a line for each kernel that spills, from what ``ptxas -v`` says."""
    return [
        f"{kernel} for {arch} spills {count} bytes"
        for kernel, arch, count in _KERNEL.findall(said)
        if count != "0"
    ]


def main() -> int:
    """Compile what has changed; the status is 1 where a kernel spills or does not compile."""
    nvcc = building.find_nvcc()
    if nvcc is None:
        sys.stderr.write("no nvcc: csrc/laboratory/cuda was not compiled\n")
        return 0
    found: list[str] = []

    def judge(unit: building.Unit, said: str) -> None:
        lines = spills(said)
        if lines:
            unit.record.unlink()  # to be compiled, and refused, again
        found.extend(f"{unit.source.name}: {line}" for line in lines)

    try:
        units = building.cuda_units(building.OBJECTS.parent / "cuda", nvcc, building.cuda_archs())
        building.compile_all(units, judge)
    except building.BuildError as error:
        found.append(str(error))
    for line in found:
        sys.stderr.write(f"error: {line}\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
