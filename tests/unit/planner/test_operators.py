"""The predicted times that the guide quotes are those that the program prints."""

import pytest

from llm.llama.config import PRESETS
from llm.planner.operators import (
    FUSED,
    PLAIN,
    decode_bound,
    decode_bytes,
    decode_seconds,
    decode_table,
    rounding_bytes,
    train_bound,
    train_flops,
    train_seconds,
    train_table,
)
from llm.planner.workload import hardware

H100, SHAPE = hardware("H100"), PRESETS["llama-3-8b"]


def test_the_guide_has_the_tables(repo):
    guide = (repo / "docs" / "devices.md").read_text(encoding="utf-8")
    assert "\n".join(decode_table(H100)) in guide
    assert "\n".join(train_table(H100)) in guide


def test_bytes_and_flops_by_hand():
    """Llama 3 8B has 6.98e9 weights in layers and 0.525e9 in its output matrix."""
    weights, head = 32 * (2 * 4096 * 5120 + 3 * 4096 * 14336), 128256 * 4096
    keys = 2 * 32 * 8 * 128 * 2 * 100
    assert decode_bytes(SHAPE, 3, 100, 1.0) == weights + 2 * head + 3 * keys
    scores = 32 * 32 * 128 * 2 * 4096  # two products over half of 4096 positions
    assert train_flops(SHAPE, 2) == 2 * (6 * weights + 3 * scores + 8 * head)
    assert train_bound(SHAPE, H100, 2, True) * H100.half == train_flops(SHAPE, 2) - 6 * weights
    # Three bytes of a number that is rounded, or two and twice one.
    sides = 6 * 4096 + 14336, 4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096
    assert rounding_bytes(SHAPE, 5) == 5 * (6 * sides[0] + 4 * sides[1]) + 6 * weights / 32


@pytest.mark.parametrize("rows", [1, 32, 1024])
@pytest.mark.parametrize("weight", [2.0, 1.0, 0.5])
def test_no_form_beats_the_roofline(rows, weight):
    bound = decode_bound(SHAPE, H100, rows, 2048, weight)
    fused = decode_seconds(SHAPE, H100, FUSED, rows, 2048, weight)
    plain = decode_seconds(SHAPE, H100, PLAIN, rows, 2048, weight, widened=weight < 2)
    assert bound < fused < plain
    forms = (("float8", 2**28), ("auto", 2**28), ("reference", 2**25))
    trained = [train_seconds(SHAPE, H100, 8192, *form) for form in forms]
    bounds = [train_bound(SHAPE, H100, 8192, float8) for float8 in (True, False)]
    assert bounds[0] < trained[0] < trained[1] < trained[2] and bounds[1] < trained[1]
