"""PaddleNLP's ``.pdparams``: pickles of NumPy arrays, read without running or loading them.

``paddle.save`` pickles a dictionary of arrays (protocol 4), bfloat16 as uint16. A pickle can run
any code when it is loaded, so this reader knows only the opcodes and the four functions that such a
dictionary needs and builds descriptions instead of arrays; the arrays' bytes are skipped, and their
places in the file kept. The writer makes the same stream around bytes that others fill in.
"""

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from llm.llama.files.dtypes import FLOATS, native, nbytes
from llm.llama.files.safetensors import StoredTensor

_TYPES = {native(dtype).str.removeprefix("<"): dtype for dtype in FLOATS}
_NAME_TABLE = "StructuredToParameterName@@"  # paddle.save's note of its own parameter names
_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
)


@dataclass(frozen=True)
class _Payload:
    """Bytes left in the file."""

    offset: int
    size: int


class _Type:
    """Stands for ``numpy.dtype``; knows the name of the type and its byte order."""

    def __init__(self, code: str, align: bool, copy: bool) -> None:
        self.code, self.order = code, "<"

    def build(self, state: tuple[Any, ...]) -> None:
        """Take the state that NumPy pickles: version, byte order, and what plain types lack."""
        self.order = state[1]


class _Array:
    """Stands for ``numpy.ndarray``."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        self.shape: tuple[int, ...] = ()
        self.type: Any = None
        self.fortran: Any = None
        self.payload: Any = None

    def build(self, state: tuple[Any, ...]) -> None:
        """Take the state that NumPy pickles: version, shape, type, order, bytes."""
        _, self.shape, self.type, self.fortran, self.payload = state


_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_GLOBALS: dict[tuple[str, str], Any] = {
    **{(module, "_reconstruct"): _Array for module in _NUMPY_MODULES},
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Type,
    ("builtins", "tuple"): tuple,  # paddle.save's form of a named tensor
    ("__builtin__", "tuple"): tuple,
    ("collections", "OrderedDict"): dict,
}


class _Reader(pickle._Unpickler):
    """The standard library's unpickler in Python, with few opcodes and no classes."""

    def __init__(self, file: Path, stream: Any, size: int) -> None:
        super().__init__(stream)
        self._path, self._stream, self._size = file, stream, size

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a function that array pickles use."""
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        if (module, name) == ("_codecs", "encode"):
            raise UserError(
                f"{self._path} is a pickle of protocol 2; save it again with paddle.save(…, "
                "protocol=4), the default"
            )
        raise UserError(
            f"{self._path} asks to load {module}.{name}; weights are arrays only, so this file is "
            "refused: it would run code"
        )

    def _frame(self) -> None:
        # Frames only tell a reader how much to buffer; skipping that keeps file positions exact.
        self.read(8)

    def _payload(self, size: int) -> None:
        offset = self._stream.tell()
        if offset + size > self._size:
            raise UserError(
                f"{self._path} is cut off: an array ends at byte {offset + size}, the file has "
                f"{self._size}; fetch it again"
            )
        self._stream.seek(size, 1)
        self.append(_Payload(offset, size))

    def _build(self) -> None:
        state = self.stack.pop()
        self.stack[-1].build(state)

    def _unknown(self, opcode: int) -> None:
        raise UserError(
            f"{self._path} is no pickle of arrays: opcode {bytes([opcode])!r} at byte "
            f"{self._stream.tell() - 1}"
        )

    dispatch = {  # noqa: RUF012
        code: lambda self, code=code: self._unknown(code) for code in range(256)
    }
    dispatch |= {
        ord(getattr(pickle, n)): pickle._Unpickler.dispatch[ord(getattr(pickle, n))]
        for n in _OPCODES
    }
    dispatch[ord(pickle.FRAME)] = _frame
    dispatch[ord(pickle.BUILD)] = _build
    dispatch[ord(pickle.SHORT_BINBYTES)] = lambda self: self._payload(self.read(1)[0])
    dispatch[ord(pickle.BINBYTES)] = lambda self: self._payload(
        struct.unpack("<I", self.read(4))[0]
    )
    dispatch[ord(pickle.BINBYTES8)] = lambda self: self._payload(
        struct.unpack("<Q", self.read(8))[0]
    )


def read_pdparams(file: Path) -> dict[str, StoredTensor]:
    """Return the arrays of one file by name; none of their bytes is read.

    Raises:
        UserError: no such file, a pickle of anything else, or a damaged or truncated one.
    """
    try:
        with file.open("rb") as stream:
            content = _Reader(file, stream, file.stat().st_size).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (
        *(pickle.UnpicklingError, EOFError, struct.error),
        *(AttributeError, LookupError, TypeError, ValueError),
    ) as error:
        raise UserError(f"{file} is cut off or no .pdparams file: {error!r}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a dictionary of arrays")
    content.pop(_NAME_TABLE, None)
    return {str(name): _stored(file, str(name), value) for name, value in content.items()}


def _stored(file: Path, name: str, value: Any) -> StoredTensor:
    if isinstance(value, tuple) and len(value) == 2:  # paddle.save's (name, array)
        value = value[1]
    if not isinstance(value, _Array) or not isinstance(value.payload, _Payload):
        raise UserError(f"{file}: {name} is not an array of numbers")
    code = getattr(value.type, "code", None)
    if code in _TYPES and value.type.order == ">":
        raise UserError(
            f"{file}: {name} is big-endian; save it again on a little-endian machine, or after "
            "array.astype(array.dtype.newbyteorder('<'))"
        )
    if code not in _TYPES or value.type.order not in ("<", "|", "="):
        raise UserError(
            f"{file}: {name} has type {code!r}; supported: float32, float16, bfloat16 (as uint16)"
        )
    shape = value.shape
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise UserError(f"{file}: {name} has the damaged shape {shape!r}")
    if nbytes(shape, _TYPES[code]) != value.payload.size:
        raise UserError(
            f"{file}: {name} has {value.payload.size} bytes, which is not {_TYPES[code]} of shape "
            f"{list(shape)}"
        )
    if value.fortran and sum(n > 1 for n in shape) > 1:
        raise UserError(f"{file}: {name} is stored column by column; save it with paddle.save")
    return StoredTensor(file, name, _TYPES[code], shape, value.payload.offset)


def _fragment(value: Any) -> bytes:
    """Return the opcodes of a small value, without the header and the stop of a pickle."""
    return pickle.dumps(value, protocol=2)[2:-1]


def frame(arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[list[bytes], dict[str, int]]:
    """Lay out a file that ``paddle.load`` opens.

    Args:
        arrays: shape and type (F32, F16, BF16) of each array by name, in the file's order.

    Returns:
        What stands before each array and, as last item, after all of them; and the offset of each
        array's bytes.
    """
    kind = (
        f"c{_NUMPY_MODULES[0]}\n_reconstruct\ncnumpy\nndarray\n".encode()
        + _fragment((0,))
        + pickle.SHORT_BINBYTES
        + b"\1b"
        + pickle.TUPLE3
        + pickle.REDUCE
    )
    pieces, offsets, position = [], {}, 0
    before = pickle.PROTO + b"\4" + pickle.EMPTY_DICT + pickle.MARK
    for name, (shape, dtype) in arrays.items():
        size = nbytes(shape, dtype)
        before += _fragment(name) + kind + pickle.MARK + _fragment(1) + _fragment(shape)
        before += _fragment(native(dtype)) + _fragment(False)
        before += pickle.BINBYTES8 + struct.pack("<Q", size)
        offsets[name] = position + len(before)
        position = offsets[name] + size
        pieces.append(before)
        before = pickle.TUPLE + pickle.BUILD
    names = {name: name for name in arrays}
    pieces.append(
        before + _fragment(_NAME_TABLE) + _fragment(names) + pickle.SETITEMS + pickle.STOP
    )
    return pieces, offsets
