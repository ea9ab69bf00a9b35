"""Lets lm-evaluation-harness find models that installed packages declare.

Packages name their models under the entry-point group ``lm_eval.models``. Harness versions after
0.4.13 read it themselves; in 0.4.13, ``--model`` only knows the harness's own. A ``.pth`` file
installed with this project runs :func:`install` when Python starts, and nothing more happens until
``lm_eval.models`` is imported. Only the standard library is used here.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "lm_eval.models"


class _Loader:
    """Runs the module as its own loader would, then registers what packages declare."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the module's own loader makes."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module and add the declared models."""
        self._inner.exec_module(module)
        _register()


class _Finder:
    """Finds ``lm_eval.models`` where it is, and nothing else."""

    @staticmethod
    def find_spec(name: str, path: Any = None, _: Any = None) -> ModuleSpec | None:
        """Return the module's spec with :class:`_Loader` around its loader."""
        spec = PathFinder.find_spec(name, path) if name == _MODULE else None
        if spec is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


def _register() -> None:
    from importlib.metadata import entry_points

    from lm_eval.api.registry import model_registry

    for entry in entry_points(group=_MODULE):
        if entry.name not in model_registry:  # the harness's own come first
            model_registry.register(entry.name, target=entry)


def install() -> None:
    """Register declared models as soon as ``lm_eval.models`` is imported; once per process."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
