"""Starts the rehearsal device in every Python below a process that has it, when paddle is imported.

Python imports this module by its name at its start; ``rehearsal.environment`` puts it in reach.
"""

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROLE = os.environ.get("REHEARSAL_ROLE", "")
REPO = str(Path(__file__).resolve().parents[3])


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        sys.path.append(REPO)  # last: what the process imports comes first
        from tests.device import rehearsal

        rehearsal.start(ROLE)


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "paddle":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


if ROLE:
    sys.meta_path.insert(0, _Finder)
