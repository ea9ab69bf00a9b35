"""Calls of tools on the chat page, by a model that decides to make them: `make real-model`'s."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_browser import CHROMIUM, FLAGS, Tab, wait_for
from serving_process import REPO, ServerProcess, free_port

MODEL = REPO / "outputs/real-model"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.timeout(280),
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="`make real-model` writes it"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """A tab on the page of server.py, as users start it."""
    sync = pytest.importorskip("playwright.sync_api", reason="requirements-dev.txt has it")
    port, page_port = free_port(), free_port()
    command = [sys.executable, str(REPO / "server.py"), "--model_name_or_path", str(MODEL)]
    command += ["--device=cpu", "--dtype=bfloat16", f"--port={page_port}", f"--flask_port={port}"]
    with (
        ServerProcess(command, tmp_path / "server.log", port, page_port) as server,
        sync.sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        server.wait_for_log("chat page ready")
        server.wait_until_ready()
        tab = Tab(browser.new_context(locale="en-GB"), server.page_url).goto()
        yield tab
        tab.close()
        browser.close()
        assert server.stop() == 0


# By itself a model of 135 million parameters calls nothing: told how, it does.
TOLD = (
    "When the user asks for the weather, write exactly:\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "..."}}\n</tool_call>'
)


def test_a_call_that_a_model_makes_is_shown_and_answered(tab: Tab) -> None:
    for name, value in {"temperature": "0", "max_tokens": "160", "system": TOLD}.items():
        tab.page.fill(f"#set-{name}", value)
    tab.page.fill("#set-tools", json.dumps([TOOL]))
    tab.send("Call get_weather for Paris.")
    call: Any = tab.page.locator(".call")
    wait_for(lambda: call.count() == 1, "the call", 60)
    tab.idle()
    assert call.locator("strong").text_content() == "Calls get_weather"
    assert json.loads(call.locator("pre").text_content()) == {"city": "Paris"}
    assert "<tool_call>" not in tab.answer, "the call is no text"
    assert tab.page.get_attribute("#message", "placeholder") == "Result of get_weather"
    tab.send("sunny, 21 °C")
    wait_for(lambda: len(tab.answers) == 2, "the answer to the result")
    tab.idle()
    assert tab.page.locator(".turn.tool .typed").text_content() == "sunny, 21 °C"
    assert tab.page.locator(".turn .error").count() == 0
    tab.reload()
    wait_for(lambda: call.count() >= 1 and len(tab.answers) == 2, "kept")
