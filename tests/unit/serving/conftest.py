"""A client on the Flask application around a fake model."""

from collections.abc import Iterator
from typing import Any

import pytest
from fakes import LocalWorker, MakeClient, make_served
from flask.testing import FlaskClient

from llm.serving.api import create_app
from llm.serving.requests import Limits
from llm.serving.steps import Loaded
from llm.serving.web import ApiSettings


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    """``make_client(served, src_length=..., ...)``; the worker is ``client.worker``."""
    workers = []

    def make(
        served: Loaded | None = None,
        *,
        src_length: int = 100,
        max_length: int = 50,
        max_queue: int = 4,
        tool_call_parser: str = "auto",
        **settings: Any,
    ) -> FlaskClient:
        served = served or make_served()
        worker = LocalWorker(lambda: served, max_queue)
        worker.start()
        worker.wait_loaded()
        workers.append(worker)
        limits = Limits(src_length, max_length, tool_call_parser)
        app = create_app(worker, ApiSettings(limits, **settings))
        client = app.test_client()
        client.worker = worker
        return client

    yield make
    for worker in workers:
        worker.close()
