"""Files as ``torch.save`` writes them, made by the standard library's pickle and zipfile alone."""

import io
import pickle
import sys
import types
import zipfile
from typing import Any
from unittest import mock

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def _named(name: str, made: Any) -> Any:
    """Give something the name under which a pickle is going to look for it."""
    made.__module__, _, made.__qualname__ = name.rpartition(".")
    made.__name__ = made.__qualname__
    return made


_REBUILD = _named("torch._utils._rebuild_tensor_v2", lambda *_: None)
_CLASSES = {
    name: _named(f"torch.{name}", type(name, (), {})) for name in (*_STORAGES.values(), "Size")
}
_DCP = "torch.distributed.checkpoint"
METADATA = {
    name: _named(f"{_DCP}.{module}.{name}", type(name, (), {}))
    for module, name in (
        ("metadata", "Metadata"),
        ("metadata", "MetadataIndex"),
        ("filesystem", "_StorageInfo"),
    )
}


def _modules() -> dict[str, types.ModuleType]:
    found: dict[str, types.ModuleType] = {}
    for made in (_REBUILD, *_CLASSES.values(), *METADATA.values()):
        parts = made.__module__.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            found.setdefault(name, types.ModuleType(name))
        setattr(found[made.__module__], made.__name__, made)
    return found


class _Storage:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class _Tensor:
    def __init__(self, values: np.ndarray) -> None:
        self.values = np.ascontiguousarray(values)

    def __reduce__(self) -> Any:
        shape = self.values.shape
        strides = tuple(step // self.values.itemsize for step in self.values.strides)
        return _REBUILD, (_Storage(self.values), 0, shape, strides, False, {})


class _Pickler(pickle.Pickler):
    def __init__(self, stream: Any, protocol: int) -> None:
        super().__init__(stream, protocol)
        self.storages: list[np.ndarray] = []

    def persistent_id(self, made: Any) -> Any:
        if not isinstance(made, _Storage):
            return None
        self.storages.append(made.values)
        kind = _CLASSES[_STORAGES[made.values.dtype.name]]
        return "storage", kind, str(len(self.storages) - 1), "cpu", made.values.size

    def reducer_override(self, made: Any) -> Any:
        return _Tensor(made).__reduce__() if isinstance(made, np.ndarray) else NotImplemented


def dumps(content: Any, protocol: int = 2) -> tuple[bytes, list[np.ndarray]]:
    """Pickle content in which arrays are tensors; return the pickle and the storages."""
    stream = io.BytesIO()
    with mock.patch.dict(sys.modules, _modules()):
        pickler = _Pickler(stream, protocol)
        pickler.dump(content)
    return stream.getvalue(), pickler.storages


def save(content: Any) -> bytes:
    """Return a file of ``torch.save``."""
    pickled, storages = dumps(content)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("saved/data.pkl", pickled)
        archive.writestr("saved/byteorder", "little")
        for key, values in enumerate(storages):
            archive.writestr(f"saved/data/{key}", values.tobytes())
        archive.writestr("saved/version", "3\n")
    return stream.getvalue()


def made_of(kind: str, **fields: Any) -> Any:
    """Return an object of one of ``METADATA`` with fields."""
    made = METADATA[kind]()
    made.__dict__.update(fields)
    return made
