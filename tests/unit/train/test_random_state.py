"""Random generators of checkpoints, on machines with other numbers of GPUs."""

import json
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from llm.parallel.topology import single
from llm.train import checkpoints, state


def generator_state(seed):
    """The state of a generator of Paddle's; a CPU's stands for a GPU's."""
    before = paddle.get_rng_state("cpu")
    paddle.seed(seed)
    made = paddle.get_rng_state("cpu")[0]
    paddle.set_rng_state(before, "cpu")
    return made


@pytest.fixture
def gpus(monkeypatch):
    """``gpus(count, current)``: a machine whose generators Paddle gets and sets all at once."""
    get, put = paddle.get_rng_state, paddle.set_rng_state

    def have(count, current):
        states = [generator_state(100 + number) for number in range(count)]

        def set_states(given, device=None):
            if device != "gpu":
                put(given, device)
                return
            if len(given) != count:  # as Paddle does
                raise ValueError(f"Length of gpu state list should be {count}, {len(given)} given")
            states[:] = given

        monkeypatch.setattr(
            paddle, "get_rng_state", lambda d=None: list(states) if d == "gpu" else get(d)
        )
        monkeypatch.setattr(paddle, "set_rng_state", set_states)
        monkeypatch.setattr(paddle.device, "get_device", lambda: f"gpu:{current}")
        return states

    return have


def numbers(states):
    return [one.__getstate__() for one in states]


@pytest.mark.parametrize(("count", "current"), [(1, 0), (4, 0), (4, 3)])
@pytest.mark.parametrize(("then_count", "then"), [(1, 0), (4, 2), (8, 7)])
def test_a_process_keeps_the_generator_of_its_own_gpu(gpus, count, current, then_count, then):
    own = gpus(count, current)[current].__getstate__()
    saved = json.loads(json.dumps(state.random_state()))
    now = gpus(then_count, then)
    now[:] = [generator_state(7 * number) for number in range(then_count)]
    others = numbers(now)
    state.restore_random_state(saved)
    assert now[then].__getstate__() == own
    assert [s for i, s in enumerate(numbers(now)) if i != then] == [
        s for i, s in enumerate(others) if i != then
    ]


def test_states_of_all_gpus_are_read_still(gpus):
    """Checkpoints of before have one for each GPU that the process saw."""
    states = gpus(4, 2)
    saved = state.random_state()
    saved["paddle"]["gpu"] = [state._saved("gpu", number)[0] for number in range(4)]
    wanted, first = states[2].__getstate__(), states[0].__getstate__()
    for count, current, expected in ((4, 2, wanted), (3, 2, wanted), (1, 0, first)):
        now = gpus(count, current)
        now[:] = [generator_state(9)] * count
        state.restore_random_state(saved)
        assert now[current].__getstate__() == expected


def test_a_checkpoint_of_a_cpu_starts_the_generators_anew_on_a_gpu(gpus, tmp_path):
    saved = state.random_state()
    assert list(saved["paddle"]) == ["cpu"]
    topology = single()
    checkpoints.write_json(state.random_state_file(tmp_path, topology), saved)
    checkpoints.write_json(tmp_path / checkpoints.LOADER_STATE, {})
    trainer = SimpleNamespace(
        topology=topology, run=SimpleNamespace(seed=5), state=SimpleNamespace(global_step=3)
    )
    gpus(1, 0)
    drawn = []
    for _ in range(2):
        state.restore_randomness(trainer, tmp_path)
        drawn.append((np.random.rand(), paddle.rand([2]).tolist()))
    assert drawn[0] == drawn[1]
    state.restore_random_state(saved)
    assert np.random.rand() != drawn[0][0]
