"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without Paddle.

python tests/native/sanitize.py [DIRECTORY OF OBJECTS]; cases are in sanitize/cases_FAMILY.cc.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from external_ops import building

FLAGS = (
    *("-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)


def build(objects: Path) -> Path:
    """Compile kernels and cases; return the program.

    Raises:
        building.BuildError: what the compiler said.
    """
    units = building.kernel_units(objects, FLAGS)
    for source in sorted((HERE / "sanitize").glob("*.cc")):
        target = objects / f"case_{source.stem}.o"
        units.append(building.unit(source, target, [*FLAGS, f"-I{HERE / 'sanitize'}"]))
    building.compile_all(units)
    program = objects / "sanitized"
    files = [str(one.target) for one in units]
    subprocess.run([building.cxx(), *FLAGS, "-fopenmp", *files, "-o", str(program)], check=True)
    return program


def main() -> int:
    """Build and run; the status is that of the program, 1 at the first error found."""
    objects = Path(sys.argv[1]) if len(sys.argv) > 1 else building.OBJECTS.parent / "sanitized"
    try:
        program = build(objects)
    except building.BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([program], env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
