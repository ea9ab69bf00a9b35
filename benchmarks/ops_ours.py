"""The cases of bench_ops.py on this suite's native ops."""

import ctypes
import itertools
import sys
from collections.abc import Callable
from typing import Any

from bounds import load_paddle
from interleave import Run, serve
from ops_cases import CASES, STEPS, Case, weights_for


def _with_gradient(function: Callable[..., Any], inputs: list[Any], backward: bool) -> Run:
    import paddle

    if not backward:

        def forward() -> None:
            with paddle.no_grad():
                function(*inputs)

        return forward
    for tensor in inputs:
        tensor.stop_gradient = False
    out = function(*inputs)
    gradient = paddle.randn(out.shape)

    class Given(paddle.autograd.PyLayer):
        """Hands the gradient on, as a layer behind would; paddle.grad copies what it is given."""

        @staticmethod
        def forward(ctx: Any, out: Any) -> Any:
            return paddle.zeros([1])

        @staticmethod
        def backward(ctx: Any, one: Any) -> Any:
            return gradient

    end = Given.apply(out)
    return lambda: paddle.grad([end], inputs, retain_graph=True)


def _rms_norm(case: Case) -> Run:
    import paddle

    from external_ops.rms_norm import rms_norm_native

    rows, size = case.sizes
    inputs = [paddle.randn([rows, size]), paddle.randn([size])]
    return _with_gradient(lambda x, w: rms_norm_native(x, w, 1e-5), inputs, case.backward)


def _attention(case: Case) -> Run:
    import paddle

    from external_ops.flash_attention import causal_attention_native

    length, heads, size = case.sizes
    inputs = [paddle.randn([1, length, heads, size]) for _ in range(3)]
    return _with_gradient(causal_attention_native, inputs, case.backward)


def _packed(kind: str, inputs: int, outputs: int) -> Any:
    """Return a random packed weight; of 4 bits, with a scale for each 32 inputs."""
    import numpy as np
    import paddle

    from external_ops.linear import pack_weight

    if not kind.startswith("int"):
        return pack_weight(paddle.randn([outputs, inputs]), kind)
    random = np.random.default_rng(0)
    if kind.startswith("int8"):
        integers = random.integers(-127, 128, [outputs, inputs], dtype=np.int8)
        scale = np.full([outputs, 1], 1 / 64, np.float32)
    else:
        integers = random.integers(0, 256, [outputs, inputs // 2], dtype=np.uint8)
        scale = np.full([outputs, inputs // 32], 1 / 64, np.float32)
    return pack_weight(paddle.to_tensor(integers), kind, paddle.to_tensor(scale))


def _weights(case: Case) -> list[Any]:
    """Return random packed weights, more than a cache holds."""
    _, inputs, outputs = case.sizes
    first = _packed(case.kind, inputs, outputs)
    count = weights_for(first.data.numel().item())
    return [first] + [_packed(case.kind, inputs, outputs) for _ in range(count - 1)]


def _linear(case: Case) -> Run:
    import paddle

    x, turn = paddle.randn([case.sizes[0], case.sizes[1]]), itertools.cycle(_weights(case))
    return lambda: next(turn)(x)


def _frozen(case: Case) -> Run:
    """A product with a matrix ``[outputs, inputs]`` that does not train, or its gradient."""
    import paddle

    from external_ops.frozen_matmul import multiplied

    rows, inputs, outputs = case.sizes
    scale = None
    if case.kind == "bfloat16":
        matrix = paddle.randn([outputs, inputs]).astype("bfloat16")
    else:
        four = case.kind == "int4"
        high, width = (256, inputs // 2) if four else (127, inputs)
        matrix = paddle.randint(0, high, [outputs, width]).astype("uint8" if four else "int8")
        scale = paddle.full([outputs, inputs // 128 if four else 1], 1 / 64)
    x = paddle.randn([rows, outputs if case.backward else inputs])
    return lambda: multiplied(x, matrix, scale, not case.backward)


class _LinearArgs(ctypes.Structure):
    """struct llama_ops_linear_args, its weight unfolded (csrc/include/llama_ops/linear.h)."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scale")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "groups")),
        *((name, ctypes.c_int) for name in ("kind", "scale_dtype")),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "residual", "out")),
        ("rows", ctypes.c_int64),
        ("prepared", ctypes.c_void_p),
    )


def _linear_kernel(case: Case) -> Run:
    """Return the product through the C interface, as operators for whole networks call it."""
    import paddle

    from external_ops import native
    from external_ops.linear import KINDS

    rows, inputs, outputs = case.sizes
    weights = _weights(case)
    x, out = paddle.randn([rows, inputs]), paddle.zeros([rows, outputs])
    calls = []
    for weight in weights:
        scale = weight.scale
        args = _LinearArgs(rows=rows, inputs=inputs, outputs=outputs, kind=KINDS.index(case.kind))
        args.data, args.x, args.out = weight.data.data_ptr(), x.data_ptr(), out.data_ptr()
        args.groups = 1
        if scale is not None:
            args.scale, args.groups = scale.data_ptr(), scale.shape[1]
            args.scale_dtype = int(scale.dtype == paddle.bfloat16)
        args.owners = weight, x, out  # as long as there are pointers to them
        calls.append(args)
    product, turn = native.library().llama_ops_linear, itertools.cycle(calls)

    def run() -> None:
        product(ctypes.byref(next(turn)))

    for number in (0, len(weights) - 1):  # the structure above is the kernel's, or this fails
        expected = weights[number](x)
        product(ctypes.byref(calls[number]))
        if not paddle.equal_all(out, expected):
            raise RuntimeError("the C interface and the operator give different products")
    return run


def _swiglu(case: Case) -> Run:
    import paddle

    from external_ops.swiglu import swiglu_native

    inputs = [paddle.randn(case.sizes) for _ in range(2)]
    return _with_gradient(swiglu_native, inputs, case.backward)


def _rotary(case: Case) -> Run:
    import paddle

    from external_ops.rotary import rotary_native

    length, heads, size = case.sizes
    angles = paddle.randn([1, length, 1, size // 2])
    cos, sin = paddle.cos(angles), paddle.sin(angles)
    x = paddle.randn([1, length, heads, size])
    return _with_gradient(lambda one: rotary_native(one, cos, sin), [x], case.backward)


def _cross_entropy(case: Case) -> Run:
    import paddle

    from external_ops.cross_entropy import cross_entropy_native

    rows, hidden, vocabulary = case.sizes
    x, weight = paddle.randn([rows, hidden]) * 0.1, paddle.randn([hidden, vocabulary]) * 0.1
    labels = paddle.randint(0, vocabulary, [rows])
    x.stop_gradient = weight.stop_gradient = False

    def run() -> None:
        loss = cross_entropy_native(x, weight, labels)[0].sum()
        paddle.grad([loss], [x, weight])

    return run


def _adamw(case: Case) -> Run:
    import paddle

    from external_ops.adamw import adamw_native

    (size,) = case.sizes
    count = size // (1 << 20)
    state = [[paddle.rand([1 << 20]) for _ in range(count)] for _ in range(4)]
    powers = [[paddle.to_tensor([value]) for _ in range(count)] for value in (0.9, 0.95)]
    settings = {"rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    return lambda: adamw_native(*state, *powers, decays=[0.1] * count, **settings)


def _layers(kind: str, sizes: tuple[int, ...], count: int) -> Any:
    """Return random layers of these sizes: hidden, feed-forward, query and key heads, head."""
    import paddle

    from external_ops.decoder import DecoderLayer, DecoderWeights

    hidden, ffn, heads, groups, head = sizes

    def layer() -> DecoderLayer:
        inner = heads * head
        shapes = [(hidden, inner + 2 * groups * head), (inner, hidden), (hidden, 2 * ffn)]
        made = [_packed(kind, *shape) for shape in (*shapes, (ffn, hidden))]
        return DecoderLayer(paddle.ones([hidden]), paddle.ones([hidden]), *made)

    return DecoderWeights([layer() for _ in range(count)])


def _decoder(case: Case) -> Run:
    """Return a step of random layers that decodes a token of some sequences."""
    import numpy as np
    import paddle

    from external_ops.decoder import decoder_native

    hidden, _, heads, groups, head, count, rows = case.sizes
    past, block = 200, 64
    weights = _layers(case.kind, case.sizes[:5], count)
    blocks = past // block + 1
    caches = [paddle.randn([rows * blocks, block, groups, head]) for _ in range(2 * count)]
    caches = [cache.astype("bfloat16") for cache in caches]
    table = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
    plan = [paddle.to_tensor(one) for one in (table, np.arange(rows, dtype=np.int32))]
    plan.append(paddle.to_tensor(np.full(rows, past, np.int32)))
    frequency = paddle.rand([head // 2])
    x = paddle.randn([rows, hidden])
    fixed = {"heads": heads, "eps": 1e-5}
    return lambda: decoder_native(x, weights, caches, *plan, frequency, **fixed)


_STEP = 512  # tokens of a prompt at a time, as the engine runs it


def _places(length: int) -> tuple[Any, Any, list[Any]]:
    """Return the block table, the sequence of each token of a step, and positions by step."""
    import numpy as np
    import paddle

    blocks = paddle.to_tensor(np.arange(length // 16, dtype=np.int32)[None])
    places = np.arange(length, dtype=np.int32).reshape(-1, _STEP)
    return blocks, paddle.zeros([_STEP], "int32"), [*map(paddle.to_tensor, places)]


def _empty_caches(length: int, groups: int, head: int, dtype: str) -> list[Any]:
    import paddle

    from external_ops.paged_attention import stored_dim

    shape = [length // 16, 16, groups, stored_dim(head, dtype)]
    return [paddle.zeros(shape, dtype) for _ in "kv"]


def _paged(case: Case) -> Run:
    """Attention of a whole prompt over a paged cache of some type, in steps."""
    import paddle

    from external_ops.paged_attention import paged_attention_native

    length, heads, groups, head = case.sizes
    table, sequence, positions = _places(length)
    caches = _empty_caches(length, groups, head, case.kind)
    steps = [[paddle.randn([_STEP, n, head]) for n in (heads, groups, groups)] for _ in positions]

    def run() -> None:
        for qkv, position in zip(steps, positions, strict=True):
            paged_attention_native(*qkv, *caches, table, sequence, position)

    return run


def _prompt(case: Case) -> Run:
    """A whole prompt through one layer over a cache in bfloat16, in steps."""
    import paddle

    from external_ops.decoder import decoder_native

    length, hidden, ffn, heads, groups, head = case.sizes
    table, sequence, positions = _places(length)
    caches = _empty_caches(length, groups, head, "bfloat16")
    weights = _layers(case.kind, (hidden, ffn, heads, groups, head), 1)
    x, frequency = paddle.randn([_STEP, hidden]), paddle.rand([head // 2])
    fixed = {"heads": heads, "eps": 1e-5}

    def run() -> None:
        for position in positions:
            decoder_native(x, weights, caches, table, sequence, position, frequency, **fixed)

    return run


FAMILIES = {
    "rms_norm": _rms_norm,
    "attention": _attention,
    "paged": _paged,
    "prompt": _prompt,
    "linear": _linear,
    "frozen": _frozen,
    "linear_kernel": _linear_kernel,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
    "decoder": _decoder,
}


def main(threads: int) -> None:
    """Serve the cases with so many threads."""
    load_paddle(threads)
    from external_ops import native

    native.library()  # loads the operators, or says why there are none
    cases = CASES | STEPS
    serve(lambda name: FAMILIES[cases[name].family](cases[name]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
