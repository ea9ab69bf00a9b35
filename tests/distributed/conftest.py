"""The fixture that runs a function on N processes."""

from collections.abc import Iterator

import pytest

from tests.distributed.rank_server import RankServer


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankServer]:
    """``ranks(n, "module:function", *json_arguments, timeout=60)``: each rank's returned value.

    The server starts with the first test that asks for it and serves this whole test process.
    """
    server = RankServer()
    yield server
    server.close()
