"""What bench_ops.py measures; imported by both sides."""

from dataclasses import dataclass, replace

_BEYOND_CACHE = 192 << 20


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Args:
        family: what both sides call it.
        sizes: of the family's own meaning.
        backward: the gradient alone, of a result that is there already.
        kind: of a packed weight, or of a cache.
        peers: types in which PyTorch computes the same.
        bound: which of the machine's limits holds for it.
        work: bytes or operations that cannot be avoided.
    """

    family: str
    sizes: tuple[int, ...]
    backward: bool = False
    kind: str = ""
    peers: tuple[str, ...] = ("float32",)
    bound: str = "copy"
    work: float = 0.0


def weights_for(size: int) -> int:
    """Return how many weights of ``size`` bytes calls take in turn, to find none in a cache."""
    return -(-_BEYOND_CACHE // size)


# Rows of batches: more than one tile of the kernels, fewer than a prompt.
SEVERAL = (9, 16, 32, 64)
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


def _linear(rows: int, kind: str) -> Case:
    inputs, outputs = 2048, 5632
    weight = _BYTES[kind] * inputs * outputs
    # Scales: one an output, or one in bfloat16 for 32 inputs.
    weight += {"int8": 4 * outputs, "int4": inputs // 32 * outputs * 2}.get(kind, 0)
    peers = ("float32", "bfloat16")
    if rows <= 8:
        sizes = (rows, inputs, outputs)
        return Case("linear", sizes, False, kind, peers, "read", weight)
    work = 2.0 * rows * inputs * outputs
    return Case("linear", (rows, inputs, outputs), False, kind, peers, "multiply", work)


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    rows, size = 8192, 2048
    array = 4.0 * rows * size
    cases["rms_norm forward"] = Case("rms_norm", (rows, size), work=2 * array)
    cases["rms_norm backward"] = Case("rms_norm", (rows, size), True, work=3 * array)
    for length in (512, 1024, 2048, 4096, 8192):
        for head in (64, 128):
            heads = min(16, 32768 // length)
            # Two products of S x S x D, half of which is masked; five in the gradient.
            product = float(length * length * head * heads)
            for backward, products in ((False, 2), (True, 5)):
                name = f"attention {'backward' if backward else 'forward'} S={length} D={head}"
                sizes = (length, heads, head)
                work = products * product
                cases[name] = Case("attention", sizes, backward, bound="multiply", work=work)
    # A prompt over the paged cache, and the whole layer around it, of Llama 3.2 1B.
    length, hidden, ffn, heads, groups, head = 4096, 2048, 8192, 32, 8, 64
    attention = 2.0 * length * length * head * heads
    products = 2.0 * length * hidden * ((2 * heads + 2 * groups) * head + 3 * ffn)
    both = ("float32", "bfloat16")
    for kind in ("float32", "bfloat16", "int8"):
        sizes = (length, heads, groups, head)
        case = Case("paged", sizes, False, kind, both, "multiply", attention)
        cases[f"paged attention {kind} S={length}"] = case
    for kind in ("bfloat16", "int8"):
        sizes = (length, hidden, ffn, heads, groups, head)
        case = Case("prompt", sizes, False, kind, both, "multiply", attention + products)
        cases[f"layer {kind} S={length}"] = case
    for rows in (1, 8, *SEVERAL, 512):
        for kind in ("float32", "bfloat16", "int8", "int4"):
            cases[f"linear {kind} M={rows}"] = _linear(rows, kind)
    for rows in (1, 8, *SEVERAL):
        for kind in ("bfloat16", "int8", "int4"):  # the operator without Paddle's calling of it
            operator = cases[f"linear {kind} M={rows}"]
            cases[f"linear kernel {kind} M={rows}"] = replace(operator, family="linear_kernel")
    for kind in ("bfloat16", "int8", "int4"):
        for way in ("forward", "backward"):
            sizes, work = (512, 2048, 5632), 2.0 * 512 * 2048 * 5632
            case = Case("frozen", sizes, way == "backward", kind, bound="multiply", work=work)
            cases[f"frozen {kind} {way}"] = case
    array = 4.0 * 2048 * 5632
    cases["swiglu forward"] = Case("swiglu", (2048, 5632), work=3 * array)
    cases["swiglu backward"] = Case("swiglu", (2048, 5632), True, work=5 * array)
    array = 4.0 * 4096 * 32 * 64
    cases["rotary forward"] = Case("rotary", (4096, 32, 64), work=2 * array)
    cases["rotary backward"] = Case("rotary", (4096, 32, 64), True, work=2 * array)
    rows, hidden, vocabulary = 1024, 512, 32000
    products = 6.0 * rows * hidden * vocabulary
    sizes = (rows, hidden, vocabulary)
    cases["cross_entropy"] = Case("cross_entropy", sizes, bound="multiply", work=products)
    numbers = 64 << 20
    cases["adamw"] = Case("adamw", (numbers,), work=7 * 4.0 * numbers)
    return cases


CASES = _cases()

# Steps of whole decoders, all layers, for bench_threads.py: hidden size, feed-forward size, query
# heads, key heads, head dimension, layers, sequences with 200 tokens before each.
STEPS = {
    f"{name} {kind} {rows} sequences": Case("decoder", (*sizes, rows), kind=kind)
    for name, sizes in {
        "demo": (256, 640, 4, 2, 64, 4),
        "SmolLM2-135M": (576, 1536, 9, 3, 64, 30),
    }.items()
    for kind in ("bfloat16", "int4")
    for rows in (1, 8)
}
