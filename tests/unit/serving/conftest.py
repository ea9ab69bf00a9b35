"""A client on the Flask application around a fake model."""

from collections.abc import Iterator
from typing import Any

import pytest
from fakes import MakeClient, make_served
from flask.testing import FlaskClient

from llm.serving.api import ApiSettings, create_app
from llm.serving.loop import EngineWorker, Served
from llm.serving.requests import Limits


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    """``make_client(served, src_length=..., ...)``; the worker is ``client.worker``."""
    workers = []

    def make(
        served: Served | None = None,
        *,
        src_length: int = 100,
        max_length: int = 50,
        max_queue: int = 4,
        **settings: Any,
    ) -> FlaskClient:
        served = served or make_served()
        worker = EngineWorker(lambda: served, max_queue)
        worker.start()
        worker.wait_loaded()
        workers.append(worker)
        app = create_app(worker, ApiSettings(Limits(src_length, max_length), **settings))
        client = app.test_client()
        client.worker = worker
        return client

    yield make
    for worker in workers:
        worker.close()
