"""Fused decoder layers against the same layers in NumPy and float64, token by token."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
import pytest

from external_ops.decoder import DecoderLayer, DecoderWeights, decoder_native
from external_ops.frozen_matmul import widen
from external_ops.linear import PackedWeight, pack_weight
from external_ops.paged_attention import stored_dim
from llm.llama.quantization import linear as quantization
from tests.unit.external_ops import oracle

EPS, BLOCK = 1e-5, 4
Round = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Shape:
    """E, F, H, G and D."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    dim: int

    def linears(self) -> tuple[tuple[int, int], ...]:
        """Return outputs and inputs of each."""
        inner = self.heads * self.dim
        return (
            (inner + 2 * self.groups * self.dim, self.hidden),
            (self.hidden, inner),
            (2 * self.ffn, self.hidden),
            (self.hidden, self.ffn),
        )


ODD = Shape(hidden=72, ffn=104, heads=6, groups=2, dim=20)
SHAPES = (ODD, Shape(64, 136, 4, 4, 16), Shape(128, 72, 8, 1, 64))


def same(x: np.ndarray) -> np.ndarray:
    """Round nothing."""
    return x


def to_integers(x: np.ndarray) -> np.ndarray:
    """Round each row to 8 bits."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


class Layer:
    """Random numbers of a layer, packed, and what the packed weights stand for."""

    def __init__(self, shape: Shape, kind: str, bias: bool, rng: np.random.Generator) -> None:
        self.shape = shape
        self.norms = [rng.uniform(0.5, 1.5, shape.hidden).astype(np.float32) for _ in range(2)]
        made = [self._pack(rng, kind, *size) for size in shape.linears()]
        self.packed = [one for one, _ in made]
        self.wide = [wide for _, wide in made]
        sizes = [outputs for outputs, _ in shape.linears()]
        self.biases = [rng.standard_normal(n).astype(np.float32) if bias else None for n in sizes]

    @staticmethod
    def _pack(
        rng: np.random.Generator, kind: str, outputs: int, inputs: int
    ) -> tuple[PackedWeight, np.ndarray]:
        weight = paddle.to_tensor(rng.standard_normal((outputs, inputs)) / inputs**0.5, "float32")
        if kind in ("float32", "bfloat16"):
            return pack_weight(weight, kind), weight.astype(kind).astype("float32").numpy()
        bits = int(kind[3])
        scale = quantization.weight_scales(weight, bits, inputs // 8 if bits == 4 else 1)
        integers = quantization.round_weight(weight, scale, bits)
        stored = integers.astype("int8").numpy()
        stored = paddle.to_tensor(quantization.pack(stored) if bits == 4 else stored)
        return pack_weight(stored, kind, scale), widen(integers, scale).numpy()

    def fused(self) -> DecoderLayer:
        """Return what the kernel takes."""
        tensors = [paddle.to_tensor(norm) for norm in self.norms]
        biases = tuple(None if b is None else paddle.to_tensor(b) for b in self.biases)
        return DecoderLayer(*tensors, *self.packed, biases=biases)

    def __call__(
        self, x: np.ndarray, angles: np.ndarray, past: np.ndarray, inputs: Round, cache: Round
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a token in the type of ``x``.

        Args:
            x: ``[E]``.
            angles: ``[D / 2]``.
            past: ``[2, P, G, D]``, what earlier tokens cached.
            inputs: rounds inputs of products.
            cache: rounds what enters the cache.

        Returns:
            The token's ``[E]``, and the cache with it.
        """
        shape, dtype = self.shape, x.dtype

        def product(index: int, x: np.ndarray) -> np.ndarray:
            bias = self.biases[index]
            out = self.wide[index].astype(dtype) @ inputs(x[None])[0]
            return out if bias is None else out + bias.astype(dtype)

        def norm(index: int, x: np.ndarray) -> np.ndarray:
            rstd = 1 / np.sqrt(np.mean(x * x, dtype=dtype) + dtype.type(EPS))
            return x * rstd * self.norms[index].astype(dtype)

        def turn(x: np.ndarray) -> np.ndarray:
            half = shape.dim // 2
            turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
            return np.concatenate([turned.real, turned.imag], axis=1).astype(dtype)

        heads = product(0, norm(0, x)).reshape(-1, shape.dim)
        q, k, v = np.split(heads, [shape.heads, shape.heads + shape.groups])
        new = cache(np.stack([turn(k), v]))[:, None].astype(dtype)
        past = np.concatenate([past, new], axis=1)
        k, v = np.repeat(past, shape.heads // shape.groups, axis=2)
        scores = np.einsum("hd,phd->hp", turn(q), k) / np.sqrt(dtype.type(shape.dim))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hp,phd->hd", weights / weights.sum(-1, keepdims=True), v)
        x = x + product(1, attended.reshape(-1))
        gate, up = np.split(product(2, norm(1, x)), 2)
        return x + product(3, gate / (1 + np.exp(-gate)) * up), past


class Model:
    """Some layers, their caches, and sequences whose steps they run."""

    def __init__(self, shape: Shape, kind: str, cache: str, bias: bool = False) -> None:
        rng = np.random.default_rng(3)
        self.rng, self.shape, self.cache_type = rng, shape, cache
        self.layers = [Layer(shape, kind, bias, rng) for _ in range(2)]
        self.fused = DecoderWeights([layer.fused() for layer in self.layers])
        self.frequency = (10000.0 ** -np.linspace(0, 1, shape.dim // 2)).astype(np.float32)
        size = [16, BLOCK, shape.groups, stored_dim(shape.dim, cache)]
        self.caches = [paddle.zeros(size, cache) for _ in range(4)]
        # Blocks of a sequence lie anywhere.
        self.table = rng.permutation(16)[:12].reshape(3, 4).astype(np.int32)

    def step(self, x_TE: np.ndarray, sequence: list[int], position: list[int]) -> np.ndarray:
        """Run the kernel."""
        tensors = (paddle.to_tensor(np.array(one, np.int32)) for one in (sequence, position))
        with paddle.no_grad():
            return decoder_native(
                paddle.to_tensor(x_TE),
                self.fused,
                self.caches,
                paddle.to_tensor(self.table),
                *tensors,
                paddle.to_tensor(self.frequency),
                heads=self.shape.heads,
                eps=EPS,
            ).numpy()

    def expected(self, x_SE: np.ndarray, dtype: str, inputs: Round, cache: Round) -> np.ndarray:
        """Run a whole sequence, token by token."""
        past = [np.zeros([2, 0, self.shape.groups, self.shape.dim], dtype) for _ in self.layers]
        out = x_SE.astype(dtype)
        for position in range(len(out)):
            x = out[position]
            # The product is rounded to float32 wherever tables are computed.
            angles = (np.float32(position) * self.frequency).astype(dtype)
            for index, layer in enumerate(self.layers):
                x, past[index] = layer(x, angles, past[index], inputs, cache)
            out[position] = x
        return out


def check(model: Model, kind: str) -> None:
    """Run prompts, single tokens, a mixture and padding; compare each sequence with the oracle."""
    lengths = (9, 1, 14)
    whole = [model.rng.standard_normal((n, model.shape.hidden)).astype(np.float32) for n in lengths]
    got = [np.zeros_like(x) for x in whole]
    steps = [
        [(0, 0, 5), (1, 0, 1)],
        [(0, 5, 6)],
        [(0, 6, 7), (2, 0, 9)],
        [(0, 7, 9), (2, 9, 14)],
    ]
    for step in steps:
        sequence = [n for n, start, end in step for _ in range(start, end)] + [-1]
        position = [p for _, start, end in step for p in range(start, end)] + [0]
        parts = [whole[n][start:end] for n, start, end in step]
        x = np.concatenate([*parts, np.ones((1, model.shape.hidden), np.float32)])
        if len(sequence) == 2:  # a single token, without padding
            x, sequence, position = x[:1], sequence[:1], position[:1]
        out = model.step(x, sequence, position)
        for n, start, end in step:
            got[n][start:end], out = out[: end - start], out[end - start :]
    rounds = {"bfloat16": oracle.to_bfloat16, "int8": to_integers, "int4": to_integers}
    types = {"bfloat16": oracle.to_bfloat16, "int8": oracle.through_int8}
    stored = types.get(model.cache_type, same)
    for x, found in zip(whole, got, strict=True):
        exact = model.expected(x, "float64", same, same)
        plain = model.expected(x, "float32", rounds.get(kind, same), stored)
        assert oracle.within_twice(found, plain, exact)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_every_level(each_level, kind):
    check(Model(ODD, kind, "bfloat16" if kind == "bfloat16" else "float32", bias=True), kind)


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cache_of_int8(shape):
    check(Model(shape, "float32", "int8"), "float32")


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["float32", "int8_weight_only", "int4_weight_only"])
def test_shapes(shape, kind):
    check(Model(shape, kind, "float32"), kind)


def test_threads_do_not_matter(set_threads):
    outs = []
    for threads in (1, 2, 3):
        set_threads(threads)
        model = Model(SHAPES[2], "float32", "float32")
        x = np.random.default_rng(0).standard_normal((9, 128)).astype(np.float32)
        outs.append(model.step(x, [0] * 9, list(range(9))))
    assert np.array_equal(outs[0], outs[1]) and np.array_equal(outs[0], outs[2])


@pytest.mark.usefixtures("native_ops")
def test_no_tokens():
    model = Model(ODD, "float32", "float32")
    assert model.step(np.zeros((0, ODD.hidden), np.float32), [], []).shape == (0, ODD.hidden)


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize(
    ("sequence", "position", "message"),
    [
        ([3], [0], "token 0 is of sequence 3, but the block table has 3"),
        ([0], [16], "token 0 has position 16, but a row of the block table reaches 15"),
        ([0, 0], [0], "have to have an entry for each of 1 tokens"),
    ],
)
def test_tokens_outside_the_cache(sequence, position, message):
    model = Model(ODD, "float32", "float32")
    with pytest.raises(ValueError, match=message):
        model.step(np.zeros((1, ODD.hidden), np.float32), sequence, position)


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("number", [-1, 16])
def test_blocks_outside_the_cache_that_a_token_sees(number):
    model = Model(ODD, "float32", "float32")
    model.table[1, 0] = number  # of earlier positions
    with pytest.raises(ValueError, match=f"sequence 1 owns block {number}"):
        model.step(np.zeros((1, ODD.hidden), np.float32), [1], [BLOCK])


@pytest.mark.usefixtures("native_ops")
def test_weights_of_another_shape():
    model, other = (Model(shape, "float32", "float32") for shape in SHAPES[:2])
    model.fused = other.fused
    with pytest.raises(ValueError, match=r"llama_ops_decoder: input norm has 64 numbers; 72"):
        model.step(np.zeros((1, ODD.hidden), np.float32), [0], [0])
