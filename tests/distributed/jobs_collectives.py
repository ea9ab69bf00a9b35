"""Jobs for test_collectives.py: what each collective gives, against numpy on all ranks' numbers.

Every rank knows what the others bring (it is drawn from their rank), so each compares on its own
and returns the names of what it checked.
"""

import os

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed.communication.batch_isend_irecv import _coalescing_manager

from llm.parallel import gloo, topology
from llm.parallel.layout import Layout

FLOATS = ("float32", "float64", "bfloat16", "float16")
TYPES = (*FLOATS, "int32", "int64", "uint8", "bool")
# One rounding of the result; sums are made in float32.
RTOL = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-6, "float64": 1e-12}
ROWS = 3


def start():
    """Join the job; this rank and the number of ranks."""
    gloo.install()
    dist.init_parallel_env()
    return dist.get_rank(), dist.get_world_size()


def on_a_cuda_build():
    """Join a job on the CPUs of a machine whose Paddle could use GPUs; return group and sum."""
    for owner, name in ((core, "is_compiled_with_cuda"), (paddle, "is_compiled_with_cuda")):
        setattr(owner, name, lambda: True)
    # What the launcher says there.
    os.environ |= {"PADDLE_DISTRI_BACKEND": "auto", "FLAGS_selected_gpus": "0"}
    run = topology.start(Layout(data=2), "cpu")
    total = paddle.to_tensor([float(1 + run.rank)])
    dist.all_reduce(total, group=run.data_group)
    dist.all_reduce(total)
    return run.data_group.process_group.name(), total.item()


def drawn(rank, shape, kind, salt=0):
    """What a rank brings: small integers, so that every type holds sums and products exactly."""
    numbers = np.random.default_rng([rank, salt]).integers(1, 4, shape)
    return (numbers > 1) if kind == "bool" else numbers.astype(np.float64)


def tensor(values, kind):
    return paddle.to_tensor(values.astype(np.float32)).astype(kind)


def numbers(x):
    return x.astype("float64").numpy()


class Checks:
    """What agreed; the first thing that does not is an error."""

    def __init__(self):
        self.names = []

    def equal(self, name, actual, expected, kind="float64"):
        actual = numbers(actual) if isinstance(actual, paddle.Tensor) else np.asarray(actual)
        expected = np.asarray(expected, bool if kind == "bool" else np.float64)
        assert list(actual.shape) == list(expected.shape), (name, actual.shape, expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=RTOL.get(kind, 0), err_msg=name)
        self.names.append(name)


def groups(rank, ranks):
    """The world, its halves and its odd and even ranks: the ones that this rank is in."""
    made = {"world": dist.new_group(list(range(ranks)))}
    halves = [dist.new_group(list(range(i, i + 2))) for i in range(0, ranks, 2)]
    strided = [dist.new_group(list(range(i, ranks, 2))) for i in range(2)]
    return made | {"half": halves[rank // 2], "strided": strided[rank % 2]}


def collectives():
    """All collectives, types and groups."""
    rank, ranks = start()
    checks = Checks()
    for name, group in groups(rank, ranks).items():
        for kind in TYPES:
            label = f"{name} {kind}"
            reductions(checks, label, group, kind)
            copies(checks, label, group, kind)
            exchanges(checks, label, group, kind)
        objects(checks, name, group)
    return checks.names


def reductions(checks, label, group, kind):
    shape = (ROWS, 2)
    all_values = [drawn(rank, shape, kind) for rank in group.ranks]
    me, ranks = group.rank, group.nranks
    ops = {"SUM": np.add, "MAX": np.maximum, "MIN": np.minimum, "PROD": np.multiply}
    for op, function in ops.items():
        x = tensor(all_values[me], kind)
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op), group=group)
        checks.equal(f"all_reduce {op} {label}", x, function.reduce(all_values), kind)
    if kind in FLOATS:
        x = tensor(all_values[me], kind)
        dist.all_reduce(x, op=dist.ReduceOp.AVG, group=group)
        checks.equal(f"all_reduce AVG {label}", x, np.mean(all_values, axis=0), kind)
    total = np.add.reduce(all_values)
    x = tensor(all_values[me], kind)
    dist.reduce(x, dst=group.ranks[-1], group=group)
    expected = total if me == ranks - 1 else all_values[me]
    checks.equal(f"reduce {label}", x, expected, kind)
    parts = [drawn(rank, (ranks, ROWS), kind, 1) for rank in group.ranks]
    out = tensor(np.zeros(ROWS), kind)
    dist.reduce_scatter(out, list(tensor(parts[me], kind)), group=group)
    checks.equal(f"reduce_scatter {label}", out, np.add.reduce(parts)[me], kind)
    dist.stream.reduce_scatter(
        out, tensor(parts[me], kind).reshape([-1]), group=group, use_calc_stream=True
    )
    checks.equal(f"reduce_scatter_tensor {label}", out, np.add.reduce(parts)[me], kind)


def copies(checks, label, group, kind):
    all_values = [drawn(rank, (ROWS, 2), kind) for rank in group.ranks]
    me, ranks = group.rank, group.nranks
    own = tensor(all_values[me], kind)
    out = []
    dist.all_gather(out, own, group=group)
    checks.equal(f"all_gather {label}", paddle.stack(out), np.stack(all_values), kind)
    whole = paddle.zeros([ROWS * ranks, 2]).astype(kind)
    dist.stream.all_gather(whole, own, group=group, use_calc_stream=True)
    checks.equal(f"all_gather_into_tensor {label}", whole, np.concatenate(all_values), kind)
    # A view of a larger tensor: its memory must be written, and the rest of it left alone.
    large = paddle.zeros([2, ROWS, 2]).astype(kind)
    view = large[1]
    paddle.assign(own, view)
    dist.broadcast(view, src=group.ranks[1], group=group)
    checks.equal(f"broadcast {label}", view, all_values[1], kind)
    out = [] if me == ranks - 1 else None
    dist.gather(own, out, dst=group.ranks[-1], group=group)
    if me == ranks - 1:
        checks.equal(f"gather {label}", paddle.stack(out), np.stack(all_values), kind)
    parts = drawn(group.ranks[0], (ranks, ROWS), kind, 2)
    x = tensor(np.zeros(ROWS), kind)
    given = list(tensor(parts, kind)) if me == 0 else None
    dist.scatter(x, given, src=group.ranks[0], group=group)
    checks.equal(f"scatter {label}", x, parts[me], kind)


def exchanges(checks, label, group, kind):
    me, ranks = group.rank, group.nranks
    sent = [drawn(rank, (ranks, ROWS), kind, 3) for rank in group.ranks]
    expected = np.stack([sent[peer][me] for peer in range(ranks)])
    out = []
    dist.alltoall(out, list(tensor(sent[me], kind)), group=group)
    checks.equal(f"alltoall {label}", paddle.stack(out), expected, kind)
    out = paddle.zeros([ranks * ROWS]).astype(kind)
    dist.alltoall_single(out, tensor(sent[me], kind).reshape([-1]), group=group)
    checks.equal(f"alltoall_single {label}", out, expected.reshape(-1), kind)
    # Rank s sends s + r + 1 rows to rank r.
    sizes = [[s + r + 1 for r in range(ranks)] for s in range(ranks)]
    sent = [drawn(rank, (sum(sizes[s]), 2), kind, 4) for s, rank in enumerate(group.ranks)]
    starts = [np.cumsum([0, *row]) for row in sizes]
    expected = np.concatenate([sent[s][starts[s][me] : starts[s][me + 1]] for s in range(ranks)])
    out = paddle.zeros([sum(row[me] for row in sizes), 2]).astype(kind)
    received = [row[me] for row in sizes]
    dist.alltoall_single(out, tensor(sent[me], kind), sizes[me], received, group=group)
    checks.equal(f"alltoall_single unequal {label}", out, expected, kind)


def objects(checks, name, group):
    found = []
    dist.all_gather_object(found, {"rank": group.rank, "text": "x" * group.rank}, group=group)
    checks.equal(f"all_gather_object {name}", [f["rank"] for f in found], range(group.nranks))
    assert [len(f["text"]) for f in found] == list(range(group.nranks))
    sent = [{"from": group.rank}]
    dist.broadcast_object_list(sent, src=group.ranks[-1], group=group)
    checks.equal(f"broadcast_object_list {name}", sent[0]["from"], group.nranks - 1)
    dist.barrier(group)


def point_to_point():
    """Sends and receives in every order that NCCL allows."""
    rank, ranks = start()
    checks = Checks()
    for name, group in groups(rank, ranks).items():
        for kind in TYPES:
            label = f"{name} {kind}"
            me = group.rank
            after, before = group.ranks[(me + 1) % group.nranks], group.ranks[me - 1]
            mine, theirs = drawn(rank, (ROWS, 2), kind), drawn(before, (ROWS, 2), kind)
            x = paddle.zeros([ROWS, 2]).astype(kind)
            dist.send(tensor(mine, kind), dst=after, group=group)
            dist.recv(x, src=before, group=group)
            checks.equal(f"send recv {label}", x, theirs, kind)
            x = paddle.zeros([ROWS, 2]).astype(kind)
            task = dist.irecv(x, src=before, group=group)
            dist.isend(tensor(mine, kind), dst=after, group=group).wait()
            task.wait()
            checks.equal(f"irecv isend {label}", x, theirs, kind)
            # A collective right after messages (per-group tags of gloo went wrong here).
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
        ring(checks, name, group)
    partial(checks, dist.new_group(list(range(ranks))))
    gloo.flush()
    return checks.names


def ring(checks, name, group):
    """Large messages in both directions at once, posted as one batch."""
    me, size = group.rank, 1 << 20
    after, before = group.ranks[(me + 1) % group.nranks], group.ranks[me - 1]
    right, left = paddle.zeros([size]), paddle.zeros([size])
    own = paddle.full([size], float(me))
    batch = [
        dist.P2POp(dist.irecv, left, before, group),
        dist.P2POp(dist.isend, own, after, group),
        dist.P2POp(dist.irecv, right, after, group),
        dist.P2POp(dist.isend, own + 100 * (group.nranks == 2), before, group),
    ]
    for task in dist.batch_isend_irecv(batch):
        task.wait()
    # With two ranks both messages come from the same one, in the order of sending.
    extra = 100 * (group.nranks == 2)
    checks.equal(f"ring left {name}", left, np.full(size, (me - 1) % group.nranks))
    checks.equal(f"ring right {name}", right, np.full(size, (me + 1) % group.nranks + extra))
    # Blocking ones as a batch: all ranks receive first.
    with _coalescing_manager(group):
        dist.recv(left, src=before, group=group)
        dist.send(own + 7, dst=after, group=group)
    checks.equal(f"blocking ring {name}", left, np.full(size, (me - 1) % group.nranks + 7))


def partial(checks, group):
    """A tensor sent in pieces (``p2p_communication.py`` with tensor parallelism)."""
    process_group, me = group.process_group, group.rank
    whole = paddle.arange(8, dtype="float32").reshape([2, 4])
    if me == 0:
        process_group.send_partial_on_calc_stream(whole, 1, 2, 1)
    if me == 1:
        x = paddle.zeros([2, 4])
        process_group.recv_partial_on_calc_stream(x, 0, 2, 1)
        checks.equal("partial", x, [[0, 0, 0, 0], [4, 5, 6, 7]])
    pieces = paddle.arange(4 * group.nranks, dtype="float32")
    out = paddle.zeros([4 * group.nranks])
    own = paddle.where(pieces // 4 == me, pieces, paddle.zeros_like(pieces))
    process_group.all_gather_partial(out, own, group.nranks, me)
    checks.equal("all_gather_partial", out, np.arange(4 * group.nranks))


def mistakes(which):
    """One rank does something else; every rank returns the message that it got."""
    rank, ranks = start()
    x = paddle.zeros([4])
    try:
        if which == "operation" and rank == 1:
            dist.broadcast(x, src=0)
        elif which == "size" and rank == 1:
            dist.all_reduce(paddle.zeros([5]))
        elif which == "type" and rank == 1:
            dist.all_reduce(paddle.zeros([4], "int64"))
        elif which == "reduction" and rank == 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        elif which == "message":
            if rank == 0:
                dist.send(x, dst=1)
            if rank == 1:
                dist.recv(paddle.zeros([6]), src=0)
        elif which == "label":
            from paddle.distributed.fleet.layers.mpu import mp_ops

            mp_ops._c_softmax_with_cross_entropy(x.reshape([1, 4]), paddle.to_tensor([4 * ranks]))
        elif which == "average":
            dist.all_reduce(paddle.zeros([4], "int64"), op=dist.ReduceOp.AVG)
        else:
            dist.all_reduce(x)
    except ValueError as error:
        return [type(error).__name__, str(error)]
    return None


def absent(dies):
    """Rank 1 ends, or stays away; the others return the message that they got."""
    rank, _ = start()
    if rank == 1 and dies:
        os._exit(0)
    if rank == 1:
        import time

        time.sleep(2.5)
        return None
    try:
        dist.all_reduce(paddle.zeros([4]))
    except gloo.CollectiveError as error:
        return [type(error).__name__, str(error)]
    return None
