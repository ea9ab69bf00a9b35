"""Learning-rate schedules against PaddleNLP's own and against piecewise-linear interpolation."""

import numpy as np
import pytest

from common.errors import UserError
from llm.train.schedules import learning_rate_function, make_scheduler


def rates(kind: str, steps: int = 40, **options: object) -> list[float]:
    defaults = {"peak": 0.01, "floor": 0.0, "max_steps": steps, "warmup_steps": 0}
    function = learning_rate_function(kind, **(defaults | options))
    return [function(step) for step in range(steps)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_matches_paddlenlp_after_the_warmup(kind, warmup):
    from paddlenlp.trainer.trainer_utils import get_scheduler

    theirs = get_scheduler(kind, 0.01, num_warmup_steps=warmup, num_training_steps=40)
    expected = []
    for _ in range(40):
        expected.append(theirs.get_lr())
        theirs.step()
    ours = rates(kind.partition("_")[0], warmup_steps=warmup)
    np.testing.assert_allclose(ours[warmup:], expected[warmup:], rtol=1e-12)


def test_warmup_is_linear_and_never_zero():
    ours = rates("constant", warmup_steps=4)
    np.testing.assert_allclose(ours[:6], [0.002, 0.004, 0.006, 0.008, 0.01, 0.01])


def test_wsd_is_flat_and_then_falls_to_the_floor():
    ours = rates("wsd", floor=0.002, warmup_steps=4, decay_steps=10)
    corners = np.interp(range(40), [0, 4, 30, 40], [0.002, 0.01, 0.01, 0.002])
    np.testing.assert_allclose(ours, corners)


def test_wsd_decays_over_a_tenth_by_default():
    ours = rates("wsd")
    assert ours[:37] == [0.01] * 37 and ours[37] < 0.01


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_floor_is_reached_at_decay_steps_and_held(kind):
    ours = rates(kind, floor=0.001, decay_steps=20)
    assert ours[20:] == [0.001] * 20
    assert min(ours[:20]) > 0.001


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cosine", {"warmup_steps": 40}, "warmup_steps=40 has to be below max_steps=40"),
        ("linear", {"warmup_steps": 9, "decay_steps": 9}, "decay_steps=9 has to exceed"),
        ("wsd", {"warmup_steps": 30, "decay_steps": 11}, "together exceed max_steps=40"),
    ],
)
def test_what_does_not_fit_is_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        rates(kind, **options)


def test_scheduler_state_is_the_step():
    function = learning_rate_function(
        "cosine", peak=0.01, floor=0.001, max_steps=10, warmup_steps=2
    )
    first, second = make_scheduler(function), make_scheduler(function)
    for _ in range(5):
        first.step()
    second.set_state_dict(first.state_dict())
    for _ in range(3):
        assert second.get_lr() == first.get_lr()
        first.step()
        second.step()
