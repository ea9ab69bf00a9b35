"""The long form of the tests that compare bits, on all levels: ``make bits``.

Levels of AVX-512 run in software (software_levels.py) where the processor lacks them.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from external_ops import building, native

FILES = (
    "tests/unit/external_ops/test_row_bits.py",
    "tests/unit/external_ops/test_low_rank.py",
    "tests/unit/engine/test_request_bits.py",
    "tests/unit/engine/test_adapters.py",
)


def run(*options: str, **environment: str) -> int:
    """Run the tests; return pytest's status."""
    command = [sys.executable, "-m", "pytest", "-q", *options, *FILES]
    settings = {**os.environ, "BITS": "all", **environment}
    return subprocess.run(command, cwd=HERE.parents[1], env=settings, check=False).returncode


def main() -> int:
    """Return 1 where a test failed or the levels could not be built."""
    statuses = [run()]
    if "avx512" not in native.supported_levels():
        place = building.OBJECTS.parent / "software"
        script = str(HERE / "software_levels.py")
        if subprocess.run([sys.executable, script, str(place)], check=False).returncode:
            return 1
        statuses.append(run("-k", "avx512 or emulated", PYTHONPATH=str(place)))
    return int(any(statuses))


if __name__ == "__main__":
    raise SystemExit(main())
