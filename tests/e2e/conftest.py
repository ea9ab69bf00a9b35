"""The chat page in a browser, for all tests of it: starting both takes seconds."""

from collections.abc import Iterator
from typing import Any

import pytest
from chat_browser import CHROMIUM, FLAGS, Api, Tab, page_server, running_api
from fakes import TEMPLATE
from serving_process import ServerProcess


@pytest.fixture(scope="session")
def api() -> Iterator[Api]:
    yield from running_api()


@pytest.fixture(scope="session")
def server(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("page")
    with page_server(f"http://127.0.0.1:{api.port}", directory) as process:
        process.wait_for_log("chat page ready")
        yield process
        process.process.stdin.close()
        assert process.process.wait(10) == 0, "the page ends with the process that started it"
        assert "Traceback" not in process.log.read_text()


@pytest.fixture(scope="module")  # playwright lets nobody else run an event loop
def chromium(api: Api) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Any, api: Api) -> Iterator[Any]:
    """A browser that has never seen the page."""
    api.engine.calls.clear()
    api.served.model.tokenizer.chat_template = TEMPLATE
    context = chromium.new_context(locale="en-GB", viewport={"width": 1280, "height": 760})
    yield context
    context.close()
    if not api.is_usual:  # the test has failed, and is the only one that does
        api.restart()


@pytest.fixture
def tab(browser: Any, server: ServerProcess) -> Iterator[Tab]:
    tab = Tab(browser, server.page_url).goto()
    yield tab
    tab.close()
