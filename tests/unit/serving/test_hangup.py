"""SIGHUP of a server: what it does where there are files to read again, and where not."""

import os
import signal
from pathlib import Path

import pytest

from common.flags import load
from llm.config.serving import ServerArguments
from llm.serving import settings
from llm.serving.settings import OperatorFiles, hearing_hangup


def files(*flags: str) -> OperatorFiles:
    return OperatorFiles(load((ServerArguments,), [*flags], prog="server.py")[0])


def heard(given: OperatorFiles) -> list[str]:
    done: list[str] = []
    with hearing_hangup(given) as acts:
        acts.append(lambda: done.append("http"))
        acts.append(lambda: done.append("page"))
        os.kill(os.getpid(), signal.SIGHUP)
    return done


@pytest.mark.parametrize("terminal", [True, False])
def test_all_who_have_files_hear_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(settings, "_has_terminal", lambda: terminal)
    assert heard(files(f"--access_log={tmp_path}/log")) == ["http", "page"]


def test_a_supervisor_s_reload_ends_no_server_without_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But a terminal that is closed does."""
    monkeypatch.setattr(settings, "_has_terminal", lambda: False)
    assert heard(files()) == ["http", "page"], "which have nothing to do"
    monkeypatch.setattr(settings, "_has_terminal", lambda: True)
    before = signal.getsignal(signal.SIGHUP)
    with hearing_hangup(files()):
        assert signal.getsignal(signal.SIGHUP) is before
