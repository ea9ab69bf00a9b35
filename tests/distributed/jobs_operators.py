"""Jobs for test_collectives.py: tensor parallel operators, forward and backward."""

import numpy as np
import paddle
import paddle.distributed as dist
from jobs_collectives import Checks
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import (
    ColumnParallelLinear,
    ParallelCrossEntropy,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from paddle.distributed.fleet.utils import sequence_parallel_utils as sequence

from llm.parallel import gloo

IGNORE = -100


def start():
    """Join the job with tensor parallelism over all ranks."""
    gloo.install()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": dist.ParallelEnv().world_size}
    fleet.init(is_collective=True, strategy=strategy)
    return dist.get_rank(), dist.get_world_size()


def operators():
    """Every operator of mp_ops.py and sequence_parallel_utils.py that the network uses."""
    rank, ranks = start()
    checks = Checks()
    for kind in ("float32", "float64"):
        cross_entropy(checks, rank, ranks, kind)
    copies(checks, rank, ranks)
    linears(checks, rank, ranks)
    embedding(checks, rank, ranks)
    sequences(checks, rank, ranks)
    return checks.names


def cross_entropy(checks, rank, ranks, kind):
    vocabulary, labels_shape = 8 * ranks, (3, 5)
    random = np.random.default_rng(0)
    # Large enough that an unshifted exponential overflows float32.
    logits = random.normal(0, 60, (*labels_shape, vocabulary)).astype(kind)
    labels = random.integers(0, vocabulary, labels_shape)
    labels[0, :2] = IGNORE
    labels[1, 0], labels[1, 1] = 0, vocabulary - 1
    weights = random.normal(size=labels_shape).astype(kind)

    # In numpy: paddle's own kernel for CPUs clips exponents at -64.
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    softmax = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    keep = labels != IGNORE
    one_hot = np.eye(vocabulary)[np.where(keep, labels, 0)]
    expected = keep * (np.log(np.exp(shifted).sum(-1)) - (shifted * one_hot).sum(-1))
    expected_grad = (softmax - one_hot) * (keep * weights)[..., None]

    width = vocabulary // ranks
    mine = slice(rank * width, (rank + 1) * width)
    part = paddle.to_tensor(logits[..., mine].copy(), stop_gradient=False)
    target = paddle.to_tensor(labels)
    loss = ParallelCrossEntropy(ignore_index=IGNORE)(part, target).squeeze(-1)
    (loss * paddle.to_tensor(weights)).sum().backward()
    close = {"float32": {"rtol": 1e-6, "atol": 2e-5}, "float64": {"rtol": 1e-12, "atol": 1e-12}}
    np.testing.assert_allclose(loss.numpy(), expected, **close[kind])
    np.testing.assert_allclose(part.grad.numpy(), expected_grad[..., mine], **close[kind])
    assert not part.grad.numpy()[0, :2].any()
    assert not loss.numpy()[0, :2].any()
    group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
    _, found = mp_ops._c_softmax_with_cross_entropy(part, target, group, return_softmax=True)
    np.testing.assert_allclose(found.numpy(), softmax[..., mine], **close[kind])
    checks.names += [f"cross_entropy {kind}", f"cross_entropy backward {kind}"]


def copies(checks, rank, ranks):
    """c_identity, c_concat, c_split and mp_allreduce: forward and the conjugate backward."""
    group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
    x = paddle.full([2, 3], rank + 1.0)
    x.stop_gradient = False
    total = ranks * (ranks + 1) / 2
    y = mp_ops._c_identity(x, group=group)
    checks.equal("identity", y, np.full((2, 3), rank + 1.0))
    (y * (rank + 1.0)).sum().backward()
    checks.equal("identity backward", x.grad, np.full((2, 3), total))
    x.clear_gradient()
    y = mp_ops._mp_allreduce(x * 1.0, group=group)
    checks.equal("allreduce", y, np.full((2, 3), total))
    (y * 2.0).sum().backward()
    checks.equal("allreduce backward", x.grad, np.full((2, 3), 2.0))
    x.clear_gradient()
    y = mp_ops._c_concat(x, group=group)
    checks.equal("concat", y, np.repeat(np.arange(1, ranks + 1.0), 3)[None].repeat(2, 0))
    weights = paddle.arange(3 * ranks, dtype="float32")
    (y * weights).sum().backward()
    own = weights.numpy()[3 * rank : 3 * rank + 3]
    checks.equal("concat backward", x.grad, np.stack([own, own]))
    whole = paddle.arange(6 * ranks, dtype="float32").reshape([2, -1])
    y = mp_ops._c_split(whole, group=group)
    checks.equal("split", y, whole.numpy()[:, 3 * rank : 3 * rank + 3])


def linears(checks, rank, ranks):
    """A column-parallel layer and a row-parallel one, against two dense products."""
    random = np.random.default_rng(1)
    x_BE = random.normal(size=(4, 6)).astype("float32")
    up, down = random.normal(size=(6, 4 * ranks)), random.normal(size=(4 * ranks, 6))
    column = ColumnParallelLinear(6, 4 * ranks, has_bias=False, gather_output=False)
    row = RowParallelLinear(4 * ranks, 6, has_bias=False, input_is_parallel=True)
    mine = slice(4 * rank, 4 * rank + 4)
    column.weight.set_value(up[:, mine].astype("float32"))
    row.weight.set_value(down[mine].astype("float32"))
    x = paddle.to_tensor(x_BE, stop_gradient=False)
    y = row(column(x) ** 2)
    y.sum().backward()
    hidden = x_BE @ up
    np.testing.assert_allclose(y.numpy(), hidden**2 @ down, rtol=1e-4, atol=1e-4)
    dy = np.ones((4, 6))
    dhidden = 2 * hidden * (dy @ down.T)
    np.testing.assert_allclose(x.grad.numpy(), dhidden @ up.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        column.weight.grad.numpy(), (x_BE.T @ dhidden)[:, mine], rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(
        row.weight.grad.numpy(), (hidden[:, mine] ** 2).T @ dy, rtol=1e-4, atol=1e-3
    )
    checks.names += ["linears", "linears backward"]


def embedding(checks, rank, ranks):
    table = np.random.default_rng(2).normal(size=(4 * ranks, 3)).astype("float32")
    layer = VocabParallelEmbedding(4 * ranks, 3)
    mine = slice(4 * rank, 4 * rank + 4)
    layer.weight.set_value(table[mine])
    ids = np.array([[0, 4 * ranks - 1, 3, 0]])
    y = layer(paddle.to_tensor(ids))
    checks.equal("embedding", y, table[ids], "float32")
    y.sum().backward()
    counts = np.bincount(ids.reshape(-1), minlength=4 * ranks)[mine]
    checks.equal("embedding backward", layer.weight.grad, counts[:, None].repeat(3, 1))


def sequences(checks, rank, ranks):
    """Along the first axis: scatter, gather, all-gather and reduce-scatter, and their gradients."""
    whole = np.random.default_rng(3).normal(size=(2 * ranks, 3)).astype("float32")
    mine = slice(2 * rank, 2 * rank + 2)
    weights = np.random.default_rng(4).normal(size=(2 * ranks, 3)).astype("float32")

    def run(operation, value, weight):
        x = paddle.to_tensor(value, stop_gradient=False)
        y = operation.apply(x)
        (y * paddle.to_tensor(weight)).sum().backward()
        return y, x.grad

    y, grad = run(sequence.ScatterOp, whole, weights[mine])
    checks.equal("sequence scatter", y, whole[mine], "float32")
    checks.equal("sequence scatter backward", grad, weights, "float32")
    y, grad = run(sequence.GatherOp, whole[mine], weights)
    checks.equal("sequence gather", y, whole, "float32")
    checks.equal("sequence gather backward", grad, weights[mine], "float32")
    y, grad = run(sequence.AllGatherOp, whole[mine], weights * (rank + 1))
    total = ranks * (ranks + 1) / 2
    checks.equal("sequence all_gather", y, whole, "float32")
    np.testing.assert_allclose(grad.numpy(), weights[mine] * total, rtol=1e-5)
    y, grad = run(sequence.ReduceScatterOp, whole * (rank + 1), weights[mine])
    np.testing.assert_allclose(y.numpy(), whole[mine] * total, rtol=1e-5)
    checks.equal("sequence reduce_scatter backward", grad, weights, "float32")
