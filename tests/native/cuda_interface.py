"""The C interface of the CUDA kernels (csrc/include/llama_ops/cuda.h) through ctypes.

The same calls drive the library that ``nvcc`` built, with PyTorch tensors on a GPU, and the one
that ``g++`` built from the same sources against ``cuda_emulator.h``, with NumPy arrays.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any, Protocol

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
EVERY_SEGMENT = -(2**31)


class Arrays(Protocol):
    """What holds the numbers: NumPy arrays or PyTorch tensors."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return an array with room, whose contents mean nothing."""

    def pointer(self, array: Any) -> int | None:
        """Return the address of the first number; None for None."""

    def stream(self) -> int | None:
        """Return the stream that work is queued on."""


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_RmsNormForward = _structure(
    "rms_norm_forward_args",
    **dict.fromkeys(("x", "residual", "weight", "sum", "out", "rstd"), c_void_p),
    rows=c_int64,
    size=c_int64,
    eps=c_float,
    dtype=c_int,
)
_RmsNormBackward = _structure(
    "rms_norm_backward_args",
    **dict.fromkeys(("x", "weight", "rstd", "grad_out", "grad_sum", "grad_x"), c_void_p),
    **dict.fromkeys(("grad_residual", "grad_weight"), c_void_p),
    rows=c_int64,
    size=c_int64,
    dtype=c_int,
)
_Rotary = _structure(
    "rotary_args",
    **dict.fromkeys(("x", "cos", "sin", "out"), c_void_p),
    **dict.fromkeys(("rows", "heads", "half", "table_rows", "repeat"), c_int64),
    **dict.fromkeys(("inverse", "dtype", "table_dtype"), c_int),
)
_FlashForward = _structure(
    "flash_attention_forward_args",
    **dict.fromkeys(
        ("q", "k", "v", "segments", "key_segments", "out", "lse", "lse_rest"), c_void_p
    ),
    **dict.fromkeys(("batch", "queries", "keys", "heads", "groups", "size", "prefix"), c_int64),
    scale=c_float,
    dtype=c_int,
)
_FlashBackward = _structure(
    "flash_attention_backward_args",
    forward=_FlashForward,
    **dict.fromkeys(("grad_out", "grad_q", "grad_k", "grad_v"), c_void_p),
)
_Linear = _structure(
    "cuda_linear_args",
    **dict.fromkeys(("x", "weight", "scale", "bias", "out"), c_void_p),
    **dict.fromkeys(("rows", "outputs", "inputs", "groups"), c_int64),
    bits=c_int,
    dtype=c_int,
)
STRUCTURES = (_RmsNormForward, _RmsNormBackward, _Rotary, _FlashForward, _FlashBackward, _Linear)


class CudaOps:
    """The kernels as functions of arrays; ``dtype`` names their storage.

    Args:
        path: of the library.
        arrays: what the inputs are and the outputs shall be.

    Raises:
        ValueError: from every function, where the library has no kernel or the launch fails.
    """

    def __init__(self, path: str, arrays: Arrays) -> None:
        self.library = ctypes.CDLL(path)
        self.arrays = arrays

    def _fill(self, kind: type[ctypes.Structure], **values: Any) -> Any:
        args = kind()
        for (name, field), value in zip(
            kind._fields_, (values.get(f[0]) for f in kind._fields_), strict=True
        ):
            setattr(args, name, self.arrays.pointer(value) if field is c_void_p else value)
        return args

    def _call(self, name: str, *args: Any) -> None:
        stream = c_void_p(self.arrays.stream())
        status = getattr(self.library, f"llama_ops_cuda_{name}")(*args, stream)
        if status:
            what = "no kernel for this shape or type" if status == -1 else f"cudaError {status}"
            raise ValueError(f"llama_ops_cuda_{name}: {what}")

    def _workspace(self, name: str, args: Any) -> Any:
        bytes_of = getattr(self.library, f"llama_ops_cuda_{name}_workspace")
        bytes_of.restype = c_int64
        return self.arrays.empty((bytes_of(ctypes.byref(args)) // 4,), "float32")

    def rms_norm(self, x: Any, residual: Any, weight: Any, eps: float, dtype: str) -> tuple:
        """Return the sum (None without a residual), the normalised rows and rstd of ``[n, E]``."""
        rows, size = x.shape
        empty = self.arrays.empty
        total = None if residual is None else empty((rows, size), dtype)
        out, rstd = empty((rows, size), dtype), empty((rows,), "float32")
        args = self._fill(
            _RmsNormForward, x=x, residual=residual, weight=weight, sum=total, out=out, rstd=rstd,
            rows=rows, size=size, eps=eps, dtype=DTYPES[dtype],
        )  # fmt: skip
        self._call("rms_norm_forward", ctypes.byref(args))
        return total, out, rstd

    def rms_norm_backward(
        self, x: Any, weight: Any, rstd: Any, grad: Any, grad_sum: Any, dtype: str
    ) -> tuple:
        """Return the gradients of the rows, of the residual and of the weight."""
        rows, size = x.shape
        grad_x, grad_residual = (self.arrays.empty((rows, size), dtype) for _ in range(2))
        grad_weight = self.arrays.empty((size,), dtype)
        args = self._fill(
            _RmsNormBackward, x=x, weight=weight, rstd=rstd, grad_out=grad, grad_sum=grad_sum,
            grad_x=grad_x, grad_residual=grad_residual, grad_weight=grad_weight, rows=rows,
            size=size, dtype=DTYPES[dtype],
        )  # fmt: skip
        workspace = self._workspace("rms_norm_backward", args)
        pointer = c_void_p(self.arrays.pointer(workspace))
        self._call("rms_norm_backward", ctypes.byref(args), pointer)
        return grad_x, grad_residual, grad_weight

    def rotary(
        self, q: Any, k: Any, cos: Any, sin: Any, dtype: str, table: str, *, inverse: bool = False
    ) -> tuple:
        """Turn ``q [n, H, D]`` and ``k [n, G, D]`` by ``[table rows, D / 2]``, in one launch."""
        outs, parts = [], []
        for x in (q, k):
            rows, heads, size = x.shape
            outs.append(self.arrays.empty((rows, heads, size), dtype))
            part = self._fill(
                _Rotary, x=x, cos=cos, sin=sin, out=outs[-1], rows=rows, heads=heads,
                half=size // 2, table_rows=cos.shape[0], repeat=1, inverse=int(inverse),
                dtype=DTYPES[dtype], table_dtype=DTYPES[table],
            )  # fmt: skip
            parts.append(ctypes.byref(part))
        self._call("rotary", *parts)
        return tuple(outs)

    def _attention_args(
        self, q: Any, k: Any, v: Any, segments: Any, key_segments: Any, prefix: int, dtype: str
    ) -> tuple:
        batch, queries, heads, size = q.shape
        keys, groups = k.shape[1:3]
        out = self.arrays.empty((batch, queries, heads, size), dtype)
        lse = self.arrays.empty((batch, heads, queries), "float32")
        args = self._fill(
            _FlashForward, q=q, k=k, v=v, segments=segments, key_segments=key_segments, out=out,
            lse=lse, batch=batch, queries=queries, keys=keys, heads=heads, groups=groups, size=size,
            prefix=prefix, scale=size**-0.5, dtype=DTYPES[dtype],
        )  # fmt: skip
        return args, out, lse

    def attention(
        self, q: Any, k: Any, v: Any, segments: Any, key_segments: Any, prefix: int, dtype: str
    ) -> tuple:
        """Attend ``[B, S, H, D]`` to ``[B, K, G, D]``; return output, lse and what was called."""
        args, out, lse = self._attention_args(q, k, v, segments, key_segments, prefix, dtype)
        self._call("flash_attention_forward", ctypes.byref(args))
        return out, lse, args

    def attention_backward(
        self, q: Any, k: Any, called: Any, grad: Any, dtype: str
    ) -> tuple[Any, Any, Any]:
        """Return the gradients of queries, keys and values; ``called`` is of :meth:`attention`."""
        grad_q = self.arrays.empty(tuple(q.shape), dtype)
        grad_k = self.arrays.empty(tuple(k.shape), dtype)
        grad_v = self.arrays.empty(tuple(k.shape), dtype)
        args = _FlashBackward(called, *map(self.arrays.pointer, (grad, grad_q, grad_k, grad_v)))
        workspace = self._workspace("flash_attention_backward", args)
        pointer = c_void_p(self.arrays.pointer(workspace))
        self._call("flash_attention_backward", ctypes.byref(args), pointer)
        return grad_q, grad_k, grad_v

    def linear(self, x: Any, weight: Any, scale: Any, bias: Any, bits: int, dtype: str) -> Any:
        """Multiply ``x [n, I]`` with int8 ``[O, I]`` or packed 4-bit ``[O, I / 2]`` weights."""
        rows, inputs = x.shape
        outputs, groups = scale.shape
        out = self.arrays.empty((rows, outputs), dtype)
        args = self._fill(
            _Linear, x=x, weight=weight, scale=scale, bias=bias, out=out, rows=rows,
            outputs=outputs, inputs=inputs, groups=groups, bits=bits, dtype=DTYPES[dtype],
        )  # fmt: skip
        self._call("linear", ctypes.byref(args))
        return out
