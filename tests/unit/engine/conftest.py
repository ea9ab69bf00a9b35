"""Fixtures of the engine's tests."""

import pytest

from llm.engine.speculation import Speculator
from tests.fuzz.load_cases import as_many_as_may_be


@pytest.fixture
def eager(monkeypatch):
    """Guess as much as may be, whatever it costs."""
    monkeypatch.setattr(Speculator, "lengths", as_many_as_may_be)
