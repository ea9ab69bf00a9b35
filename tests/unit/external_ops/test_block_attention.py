"""Attention in pieces against attention over all keys at once."""

import numpy as np
import paddle
import pytest

from external_ops import block_attention as blocks
from external_ops.block_attention import Mask
from external_ops.flash_attention import causal_attention_ref

B, S, H, G, D = 2, 10, 4, 2, 6
SEGMENTS = np.array([[0] * 4 + [1] * 6, [0] * 9 + [1]])


def draw():
    rng = np.random.default_rng(2)
    shapes = {"q": [B, S, H, D], "k": [B, S, G, D], "v": [B, S, G, D], "grad": [B, S, H, D]}
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


def in_pieces(values, cut, segments):
    """Queries from ``cut`` on see a first block whole and a second one causally."""
    q = blocks.by_heads(paddle.to_tensor(values["q"][:, cut:]) * D**-0.5, G)
    grad = blocks.by_heads(paddle.to_tensor(values["grad"][:, cut:]), G)
    heads = [paddle.to_tensor(values[n]).transpose([0, 2, 1, 3]) for n in "kv"]
    rows = None if segments is None else paddle.to_tensor(segments)
    masks = [Mask(), Mask(causal=True)]
    if rows is not None:
        masks = [
            Mask(False, rows[:, cut:], rows[:, :cut]),
            Mask(True, rows[:, cut:], rows[:, cut:]),
        ]
    first, second = ([x[:, :, part] for x in heads] for part in (slice(cut), slice(cut, None)))
    out, total = blocks.block_forward(q, *second, masks[1])
    out, total = blocks.merge(out, total, *blocks.block_forward(q, *first, masks[0]))
    state = (grad, total, (grad * out).sum(-1, keepdim=True))
    grads = [
        blocks.block_backward(q, *keys, *state, mask)
        for keys, mask in zip((first, second), masks, strict=True)
    ]
    grad_q = blocks.by_rows(grads[0][0] + grads[1][0]) * D**-0.5
    of_keys = [paddle.concat([g[i] for g in grads], axis=2) for i in (1, 2)]
    return [blocks.by_rows(out), grad_q, *(g.transpose([0, 2, 1, 3]) for g in of_keys)]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["rows", "packed"])
@pytest.mark.parametrize("tile", [2, 512])
def test_pieces_add_up(monkeypatch, tile, segments):
    monkeypatch.setattr(blocks, "_TILE", tile)
    values, cut = draw(), 5
    q, k, v = (paddle.to_tensor(values[n], stop_gradient=False) for n in "qkv")
    where = None if segments is None else paddle.to_tensor(segments)
    out = causal_attention_ref(q, k, v, where)
    # Only the later queries: the earlier ones see nothing of the second block.
    later = np.r_[np.zeros(cut), np.ones(S - cut)].reshape(1, S, 1, 1)
    out.backward(paddle.to_tensor((values["grad"] * later).astype(np.float32)))
    wanted = [out[:, cut:], q.grad[:, cut:], k.grad, v.grad]
    for got, expected in zip(in_pieces(values, cut, segments), wanted, strict=True):
        np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=2e-6)
