"""When sums of gradients begin, in which buckets, and what is launched together."""

from types import SimpleNamespace

import paddle
import paddle.distributed as dist
import pytest

from llm.llama.config import TINY_NAME, load_config
from llm.parallel.layout import Layout
from llm.parallel.overlap import Overlap, cut, started
from llm.parallel.sharding import Sharding
from llm.parallel.sums import GradientSums
from llm.parallel.topology import Topology
from llm.train.checks import check_layout

TENSOR_BYTES = 4 * 2 * 2


class Group:
    """A group that writes down what it is asked for."""

    def __init__(self, backend):
        self.said = []
        self.process_group = SimpleNamespace(
            name=lambda: backend,
            _start_coalescing=lambda: self.said.append("together"),
            _end_coalescing=lambda tasks: self.said.append(tuple(tasks)),
        )


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, [[3], [5], [2], [2], [9]]),
        (7, [[3], [5, 2], [2], [9]]),
        (8, [[3, 5], [2, 2], [9]]),
        (99, [[3, 5, 2, 2, 9]]),
    ],
)
def test_buckets_are_as_large_as_the_limit_allows(limit, expected):
    sizes = [3, 5, 2, 2, 9]
    assert [sizes[part] for part in cut(sizes, limit)] == expected
    assert not cut([], limit)


def test_what_a_backend_can_launch_together_is():
    calls = [lambda: "a", lambda: "b"]
    nccl, gloo = Group("NCCL"), Group("GLOO")
    assert started(nccl, calls) == started(gloo, calls) == ["a", "b"]
    assert (nccl.said, gloo.said) == (["together", ("a", "b")], [])
    started(nccl, calls[:1])
    assert len(nccl.said) == 2, "one alone is no group"


@pytest.fixture
def summed(monkeypatch):
    """Names of parameters whose sums have begun, in order."""
    names = []

    def all_reduce(value, group, sync_op):
        assert not sync_op
        names.append(int(value.sum().item()))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return names


def weights(count):
    """Parameters; the gradient of number i of a loss of its sum times i sums to 4 i."""
    return [paddle.create_parameter([2, 2], "float32") for _ in range(count)]


def loss(parameters, used):
    return sum((parameters[i].sum() * i for i in used), paddle.zeros([]))


def sums(parameters, **fields):
    topology = Topology(Layout(data=2), data_group=Group("GLOO"))
    return GradientSums(parameters, Sharding(parameters, topology), topology, Overlap(**fields))


def test_the_last_of_several_passes_begins_the_sums_from_the_back(summed):
    parameters = weights(4)
    made = sums(parameters, passes=2, bucket_bytes=2 * TENSOR_BYTES)
    for _ in range(2):
        loss(parameters, range(4)).backward()
        assert not summed, "the first pass is not the last one"
        loss(parameters, range(4)).backward()
        assert summed == [24, 16, 8, 0], "all have begun before the backward pass is over"
        made.finish()
        assert len(summed) == 4
        summed.clear()
        for parameter in parameters:
            parameter.clear_gradient()


def test_a_missing_gradient_holds_up_later_buckets_only(summed):
    """Other ranks may have it, so the order of the sums must not depend on it."""
    parameters = weights(4)
    made = sums(parameters, passes=1, bucket_bytes=TENSOR_BYTES)
    loss(parameters, [1, 3]).backward()
    assert summed == [12]
    made.finish()
    assert summed == [12, 0, 4, 0]
    assert not parameters[2].grad.numpy().any()


@pytest.mark.parametrize(
    ("run", "layout", "said"),
    [
        ({"device": "gpu:0"}, Layout(data=2), ""),
        ({"device": "cpu"}, Layout(data=2), "on a CPU each sum and copy ends where it begins"),
        ({"device": "gpu:0"}, Layout(tensor=2), "not used: no process sees other tokens"),
        ({"device": "gpu:0", "offload_mode": "static"}, Layout(), ""),
    ],
)
def test_a_run_says_where_overlap_does_nothing(run, layout, said):
    fields = {"gradient_accumulation_steps": 1, "pipeline_parallel_config": "", "sharding": ""}
    fields |= {"recompute_num_layers": None, "overlap_communication": True, "offload_mode": "off"}
    fields |= {"layout": layout, "per_device_train_batch_size": 1}
    about = check_layout(SimpleNamespace(**fields | run), load_config(TINY_NAME), 16)
    found = [line for line in about if line.startswith("overlap_communication")]
    assert len(found) == bool(said)
    assert said in "".join(found)
