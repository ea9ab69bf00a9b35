"""Builds the native ops in place and links this environment to them.

For working on a checkout (``make ops``): changed sources need no installation, only another run.
"""

import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from external_ops import building

NAME = "llama_paddle_ops"


def main() -> int:
    """Build and link; the status is 1, with one message, where that cannot be done."""
    link = Path(sysconfig.get_paths()["platlib"]) / NAME
    try:
        if link.is_dir() and not link.is_symlink():
            raise building.BuildError(
                f"{link} is an installed package; pip uninstall llama-paddle-ops first"
            )
        building.build(HERE / NAME, NAME)
    except building.BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if not link.is_symlink() or link.resolve() != HERE / NAME:
        link.unlink(missing_ok=True)
        link.symlink_to(HERE / NAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
