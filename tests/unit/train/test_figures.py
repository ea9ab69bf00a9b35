"""A share of the peak that is printed is one: below 100 %, or absent."""

import pytest

from llm.train import figures
from llm.train.figures import Meter, PeakRate


def flushed(monkeypatch, rate, peak, again=None):
    """Flush a meter that saw ``rate`` FLOP/s; ``again`` is what a second measurement finds."""
    measured = []

    def measure():
        measured.append(again)
        return PeakRate(again, "again", measured=True)

    monkeypatch.setattr(figures, "measured_rate", measure)
    monkeypatch.setattr(figures, "peak_memory_bytes", lambda: 1)
    meter = Meter(flops_per_token=rate / 10, peak=peak, steps=1, tokens=10, seconds=1.0)
    return meter.flush(), measured, meter


@pytest.mark.parametrize(
    ("rate", "again", "share", "count"),
    [
        (50.0, None, 0.5, 0),  # as it should be
        (150.0, 300.0, 0.5, 1),  # the first measurement was beside other work
        (150.0, 120.0, None, 1),  # and the second still is
        (150.0, 80.0, None, 1),  # worse than the first
    ],
)
def test_a_measured_peak_is_measured_again(rate, again, share, count, monkeypatch):
    line, measured, meter = flushed(monkeypatch, rate, PeakRate(100.0, "x", measured=True), again)
    assert line.get("mfu") == share and len(measured) == count
    assert meter.peak.flops_per_second == max(100.0, again or 0)


def test_a_data_sheet_is_not_measured(monkeypatch):
    line, measured, _ = flushed(monkeypatch, 150.0, PeakRate(100.0, "data sheet"))
    assert "mfu" not in line and not measured


def test_no_peak_no_share(monkeypatch):
    assert "mfu" not in flushed(monkeypatch, 1.0, None)[0]


def test_matrices_that_measure_the_peak_are_not_the_runs_memory():
    """Two of 4 MiB, beside which a small model's prediction was 500 % off."""
    import paddle

    kept = paddle.zeros([1 << 20])  # 4 MiB of a run, held
    before = figures.peak_tensor_bytes()
    figures.measured_rate()
    assert figures.peak_tensor_bytes() == before >= 4 << 20, "what was before is not forgotten"
    more = paddle.zeros([before // 4])
    assert figures.peak_tensor_bytes() >= before + (4 << 20), "and it goes on from there"
    del kept, more
