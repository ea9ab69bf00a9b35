"""Tokens are chosen on the device as on the host, and little crosses between them."""

import pytest

from tests.device.jobs_sampling import PARAMS, ROWS

JOBS = "tests.device.jobs_sampling"


@pytest.mark.parametrize("rows", ROWS)
def test_tokens_are_the_hosts(device, rows):
    (wrong,) = device.call("gpu", f"{JOBS}:beside_host", rows)
    assert wrong == []


def test_only_rows_in_doubt_are_read(device):
    (counts,) = device.call("gpu", f"{JOBS}:doubts")
    assert counts == [0, len(PARAMS)]


@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_reads_and_operators_of_steps(device, kind):
    """The limits are what is needed today: a change that needs more fails here."""
    (found,) = device.call("gpu", f"{JOBS}:counted", kind)
    assert [step["reads"] for step in found.values()] == [1, 1, 1, 1]
    assert [step["a layer"] for step in found.values()] == [8, 36, 36, 8], found
    # Embedding, gathering, the last norm, the output matrix; then the choice of tokens.
    assert found["single tokens"]["operators"] - 2 * 8 <= (27 if kind == "greedy" else 87), found
