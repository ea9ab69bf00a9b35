"""Runs the fuzz modules: python -m tests.fuzz [MODULE] [--seconds N] [--seed S] [--cases N]."""

import importlib
import sys
from collections.abc import Sequence

MODULES = ("records", "tokenizers", "models", "flags", "moments", "loads", "schemas", "http")


def main(argv: Sequence[str]) -> int:
    """Run the module that is named first, or all of them; the worst exit status is returned."""
    names = list(MODULES)
    if argv and not argv[0].startswith("-"):
        if argv[0] not in MODULES:
            print(f"no module {argv[0]!r}: choose {', '.join(MODULES)}", file=sys.stderr)
            return 2
        names, argv = [argv[0]], argv[1:]
    status = 0
    for name in names:
        module = importlib.import_module(f"tests.fuzz.{name}")
        status = max(status, module.main(argv))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
