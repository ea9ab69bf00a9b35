"""Fixtures of the engine's tests."""

import pytest

from llm.engine.speculation import Speculator


@pytest.fixture
def eager(monkeypatch):
    """Guess as much as may be, whatever it costs: what is timed is not the same twice."""

    def lengths(self, limits, room):
        given = []
        for _, limit in limits:
            given.append(max(min(limit, self.drafter.most, room - sum(given)), 0))
        return given

    monkeypatch.setattr(Speculator, "lengths", lengths)
