"""Fixtures shared by every test; nothing here imports paddle before the runtime is prepared."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from llm import runtime
from tests.distributed.rank_server import RankServer

# Workers of pytest-xdist share the cores; so do the processes that their tests start.
runtime.prepare(1 if "PYTEST_XDIST_WORKER" in os.environ else None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell has what runs in the background ignore Ctrl-C, and programs that tests start would inherit
# that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Collection imports everything that tests use; Python's garbage collector need not look at it.
gc.disable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what is marked as long to ``make test-long`` and ``make rehearse-all``."""
    if os.environ.get("RUN_LONG"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def pytest_collection_finish() -> None:
    """Let the garbage collector look at what tests make, and at nothing else."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout that is being tested."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real development data beside the checkout; tests that need it skip where it is absent."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return path


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankServer]:
    """``ranks(n, "module:function", *json_arguments, timeout=60)``: each rank's returned value.

    The server starts with the first test that asks for it and serves this whole test process.
    """
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def trainers(ranks: RankServer) -> RankServer:
    """The rank server, with the slow imports of training done."""
    ranks.preload("paddlenlp_ext.trainer", "matplotlib.backends.backend_agg", "matplotlib.figure")
    return ranks
