"""The chat page in a real browser, in front of the real API on a fake model."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from chat_browser import SECONDS, Api, Tab, wait_for
from serving_process import ServerProcess

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]


def test_what_is_typed_is_what_is_sent(tab: Tab, api: Api, tmp_path: Path) -> None:
    words = "hello world " * 8
    api.answers(words, delay=0.03)
    code = "def f(x):\n    return  x\n\n\tif a<b and c>d: <b>&lt;</b>  "
    tab.send(code)
    wait_for(lambda: tab.answer != "", "the answer begins")
    partial = tab.answer
    assert partial != words.strip() and words.startswith(partial), "shown while it is generated"
    assert tab.page.locator("#stop").is_visible() and tab.draft == ""
    wait_for(lambda: tab.answer == words.strip(), "the whole answer")
    tab.idle()
    assert tab.questions == [code], "HTML is text, and no space is lost"
    assert api.asked() == f"<user>{code}<assistant>"
    tab.ask("two", words.strip())
    assert api.asked() == f"<user>{code}<assistant>{words}<user>two<assistant>", "history likewise"
    picture = tmp_path / "chat.png"
    tab.page.screenshot(path=picture)
    assert picture.stat().st_size > 5000


def test_settings_reach_the_engine_and_are_remembered(tab: Tab, api: Api) -> None:
    api.answers("hello")
    tab.page.fill("#set-system", " Be\n  brief.")
    for name, value in (("temperature", "0.25"), ("top_p", "0.5"), ("top_k", "7"), ("seed", "3")):
        tab.page.fill(f"#set-{name}", value)
    tab.page.fill("#set-max_tokens", "33")
    tab.page.fill("#set-repetition_penalty", "1.5")
    tab.page.fill("#set-stop", "x y\nz")
    tab.page.select_option("#set-model", "pirate")
    tab.reload()
    tab.ask("one", "hello")
    params = api.engine.calls[-1][1]
    assert api.asked() == "<system> Be\n  brief.<user>one<assistant>"
    assert (params.temperature, params.max_new_tokens, params.seed) == (0.25, 33, 3)
    assert (params.top_p, params.top_k, params.repetition_penalty) == (0.5, 7, 1.5)
    assert api.engine.named[-1] == "pirate"
    tab.page.fill("#set-top_k", "2.5")
    tab.send("two")
    tab.page.get_by_text('Top-k: "2.5" is not allowed; a whole number').wait_for(timeout=SECONDS)
    assert len(api.engine.calls) == 1 and tab.draft == "two"
    tab.page.click("#defaults")
    tab.ask("two", "hello")
    assert api.engine.calls[-1][1].temperature == 0.7 and api.engine.named[-1] is None
    assert api.asked().startswith("<user>one")


def test_escape_stops_and_retry_keeps_the_older_answer(tab: Tab, api: Api) -> None:
    api.answers("endless ", repeat=True, delay=0.02)
    tab.send("Go on")
    wait_for(lambda: len(tab.answer) > 20, "some text")
    tab.page.keyboard.press("Escape")
    wait_for(lambda: api.engine.running == 0, "the engine stops", seconds=10)
    tab.idle()
    kept = tab.answer
    assert kept.startswith("endless endless"), "what came stays"
    assert re.match(r"\d+ tokens · \d+\.\d tokens/s · first after", tab.page.inner_text(".meta"))
    assert "Stopped. Continue" in tab.notes
    api.answers("a better one")
    tab.do("retry")
    wait_for(lambda: tab.answer == "a better one", "the new answer")
    tab.idle()
    rate = re.search(r"([\d.]+) tokens/s", tab.page.inner_text(".meta"))
    assert rate is None or float(rate[1]) <= 130, "of 13 tokens, none over less than 0.1 s"
    assert api.asked() == "<user>Go on<assistant>", "the old answer is no part of the question"
    tab.do("older")
    wait_for(lambda: tab.answer == kept, "the older answer")
    assert tab.page.locator(".versions").text_content() == "1/2"
    tab.do("newer")
    wait_for(lambda: tab.answer == "a better one", "and back")


def test_an_earlier_question_is_edited(tab: Tab, api: Api) -> None:
    api.answers("hello")
    tab.ask("first", "hello")
    tab.ask("second", "hello")
    api.answers("other")
    tab.do("edit", ".turn.user >> nth=0")
    tab.page.fill(".editing", "1st")
    tab.page.keyboard.press("Enter")
    wait_for(lambda: tab.questions == ["1st"] and tab.answers == ["other"], "the new branch")
    tab.idle()
    assert api.asked() == "<user>1st<assistant>"
    tab.do("older", ".turn.user >> nth=0")
    wait_for(lambda: tab.questions == ["first", "second"], "the old branch is kept")


def test_an_empty_message_is_not_sent(tab: Tab, api: Api) -> None:
    tab.send("   ")
    time.sleep(0.3)
    assert tab.questions == [] and api.engine.calls == []


HOSTILE = """<style>body, .turn {display: none !important}</style>
<div style="position:fixed;inset:0;background:red;z-index:99">COVER</div>
<form action="https://example.com/steal"><button>Log in</button></form>
![x](https://example.com/x.png) <script>document.title='owned'</script> [y](javascript:alert(1))

"""


def test_hostile_answers_change_nothing_around_them(tab: Tab, api: Api) -> None:
    api.answers("hello")
    tab.ask("before", "hello")
    api.answers(HOSTILE + "w" * 3000)
    places = (
        "['#composer', '#status', '#list', '#settings'].map(s => {const r = document"
        ".querySelector(s).getBoundingClientRect(); return [r.x, r.y, r.width, r.height]})"
    )
    before, title = tab.page.evaluate(places), tab.page.title()
    tab.send("x")
    wait_for(lambda: "www" in tab.answer, "the answer")
    tab.idle()
    assert tab.page.evaluate(places) == before and tab.page.title() == title
    assert "COVER</div>" in tab.answer and "<style>body, .turn" in tab.answer
    inside = tab.page.evaluate(
        "(() => {const turn = document.querySelector('.turn.assistant:last-child'), out = turn"
        ".getBoundingClientRect(); return [...turn.querySelectorAll('.body *')].every(e => {"
        "const r = e.getBoundingClientRect(); return r.left >= out.left - 1 && r.right <= "
        "out.right + 1})})()"
    )
    assert inside, "3,000 characters without a space stay in the bubble"
    assert tab.page.locator(".turn.assistant .body :is(form, style, script, img)").count() == 0
    addresses = tab.page.locator(".turn.assistant .body a").evaluate_all(
        "all => all.map(a => a.href)"
    )
    assert addresses == ["https://example.com/x.png"], "a picture is a link to it"


def test_the_policy(server: ServerProcess) -> None:
    policy = requests.get(server.page_url, timeout=5).headers["Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["form-action"] == rules["base-uri"] == rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"


def test_a_model_without_a_chat_template_continues_the_text(tab: Tab, api: Api) -> None:
    api.served.model.tokenizer.chat_template = None
    api.answers(" world")
    tab.reload()
    tab.page.get_by_text("no chat template: it continues your text").wait_for(timeout=SECONDS)
    assert tab.page.locator("#set-system").is_hidden()
    tab.page.fill("#set-max_tokens", "1")
    tab.ask("hello", "world")
    assert api.asked() == "hello"
    assert "Cut off by the length limit. Continue" in tab.notes
    api.answers("!", delay=0.0)
    tab.do("go_on")
    wait_for(lambda: tab.answer == "world!", "it goes on")
    assert api.asked() == "hello world"


def test_an_engine_error_is_one_line_and_mended(tab: Tab, api: Api) -> None:
    api.answers("hello", fail_at=0)
    tab.send("x")
    error = tab.page.get_by_text("RuntimeError: a kernel broke")
    error.wait_for(timeout=SECONDS)
    tab.idle()
    api.answers("hello")
    tab.do("retry")
    wait_for(lambda: tab.answer == "hello", "the answer")
    assert error.count() == 0 and tab.questions == ["x"]
    assert tab.page.locator(".versions").count() == 0, "nothing to compare with"


def test_a_place_in_line(tab: Tab, api: Api) -> None:
    api.answers("endless ", repeat=True, delay=0.02, max_sequences=1)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    url = f"http://127.0.0.1:{api.port}/v1/chat/completions"
    with requests.post(url, json=body, stream=True, timeout=30) as first:
        lines = first.iter_lines()  # dropped, it would close the connection
        next(lines)
        tab.send("and me")
        tab.page.get_by_text("In line, place 1 …").wait_for(timeout=SECONDS)
        tab.is_in("busy")
        api.answers("hello")
    wait_for(lambda: tab.answer == "hello", "the answer")
    tab.is_in("ok")
    api.answers("", max_sequences=4)


def test_stopping_before_the_first_word_gives_the_question_back(tab: Tab, api: Api) -> None:
    api.answers("hello", delay=2.0)  # a slow machine has pressed Stop by then
    tab.send("slow?")
    tab.page.get_by_text("Thinking …").wait_for(timeout=SECONDS)
    wait_for(lambda: api.engine.running == 1, "it runs")
    tab.page.click("#stop")
    wait_for(lambda: tab.draft == "slow?" and tab.questions == [], "the question")
    wait_for(lambda: api.engine.running == 0, "the engine stops")


def test_the_api_goes_and_comes_back(tab: Tab, api: Api) -> None:
    api.answers("hello")
    api.http.stop()
    tab.send("Anyone?")
    line = tab.page.get_by_text("The API does not answer. Is the server running?")
    line.wait_for(timeout=SECONDS)
    tab.is_in("gone")
    api.start()
    tab.is_in("ok")
    wait_for(lambda: line.count() == 0, "the error goes")
    assert tab.questions == ["Anyone?"], "the question is not lost"
    tab.do("retry")
    wait_for(lambda: tab.answer == "hello", "the answer")


def test_conversations_are_kept_listed_and_exported(tab: Tab, api: Api) -> None:
    api.answers("*hello*")
    tab.page.fill("#message", "a draft")
    tab.reload()
    assert tab.draft == "a draft"
    tab.ask("one", "hello")
    tab.page.click("#new")
    wait_for(lambda: tab.questions == [], "an empty page")
    tab.ask("two", "hello")
    tab.reload()
    wait_for(lambda: tab.answers == ["hello"] and tab.questions == ["two"], "it is there again")
    names = tab.page.locator("#list .name")
    assert names.all_text_contents() == ["two", "one"]
    tab.page.locator("#list summary").nth(1).click()
    tab.page.get_by_role("button", name="Rename").click()
    tab.page.locator("#list input").fill("The first")
    tab.page.keyboard.press("Enter")
    wait_for(lambda: "The first" in names.all_text_contents(), "its name")
    exported = {}
    for what in ("Markdown", "JSON"):
        tab.page.locator("#list summary").nth(1).click()
        with tab.page.expect_download() as download:
            tab.page.get_by_role("button", name=f"Export as {what}").click()
        exported[what] = Path(download.value.path())
    assert (
        exported["Markdown"].read_text() == "# The first\n\n## You\n\none\n\n## Model\n\n*hello*\n"
    )
    saved = json.loads(exported["JSON"].read_text())
    assert saved["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "*hello*"},
    ]
    tab.page.on("dialog", lambda dialog: dialog.accept())
    tab.page.locator("#list summary").nth(1).click()
    tab.page.get_by_role("button", name="Delete").click()
    wait_for(lambda: names.all_text_contents() == ["two"], "it is gone")
    tab.page.set_input_files("#import-file", exported["JSON"])
    wait_for(lambda: tab.questions == ["one"] and tab.answer == "hello", "it is back")


def test_an_answer_goes_on_through_a_reload(tab: Tab, api: Api) -> None:
    words = "hello world " * 40
    api.answers(words, delay=0.05)  # a reload takes less, beside other work, too
    tab.send("Go on")
    wait_for(lambda: len(tab.answer) > 20, "some text")
    before = tab.answer
    tab.reload()
    wait_for(lambda: tab.answer.startswith(before), "what had come")
    assert tab.page.locator("#stop").is_visible() and len(tab.answer) < len(words.strip())
    wait_for(lambda: tab.answer == words.strip(), "and what comes")
    tab.idle()
    assert len(api.engine.calls) == 1 and "ended by itself" in tab.page.inner_text(".meta")
    api.answers("endless ", repeat=True, delay=0.02)
    tab.send("And stop")
    wait_for(lambda: "endless" in tab.answer, "it begins")
    said = f"<user>Go on<assistant>{words}<user>And stop<assistant>"
    assert api.asked() == said, "nothing of it was taken in twice"
    tab.reload()
    tab.page.locator("#stop").click()
    wait_for(lambda: api.engine.running == 0, "the engine stops")
    tab.idle()
    assert "Stopped. Continue" in tab.notes and tab.answer.startswith("endless")


def test_what_came_stays_where_it_is_stopped_before_it_comes_anew(tab: Tab, api: Api) -> None:
    api.answers("endless ", repeat=True, delay=0.02)
    tab.send("Go on")
    wait_for(lambda: "endless" in tab.answer, "it begins")
    tab.page.route("**/follow", lambda route: route.fulfill(status=200, body=""))
    tab.reload()
    with tab.page.expect_response("**/follow"):
        pass
    tab.page.locator("#stop").click()
    wait_for(lambda: api.engine.running == 0, "the engine stops")
    tab.idle()
    assert "Stopped. Continue" in tab.notes and tab.answer.startswith("endless")
    tab.page.unroute("**/follow")


@pytest.mark.long
def test_two_tabs(tab: Tab, browser: Any, api: Api) -> None:
    api.answers("hello world " * 30, delay=0.03)
    tab.send("one")
    wait_for(lambda: tab.answer != "", "it begins")
    other = Tab(browser, tab.url).goto("/" + tab.page.url.partition("/#")[2].join(["#", ""]))
    wait_for(lambda: other.questions == ["one"] and other.answer != "", "it is seen there")
    wait_for(lambda: other.answer == tab.answer == ("hello world " * 30).strip(), "whole in both")
    tab.idle()
    api.answers("more")
    other.ask("two", "more")
    wait_for(lambda: tab.questions == ["one", "two"] and tab.answer == "more", "in both")
    other.close()


def test_old_turns_leave_a_full_context_with_a_note(tab: Tab, api: Api) -> None:
    api.answers("hello")
    api.restart(limits=(60, 50))
    tab.ask("q" * 30, "hello")
    tab.ask("w" * 30, "hello")
    tab.page.locator(".left-out").wait_for(timeout=SECONDS)
    assert tab.page.locator("#turns > *").evaluate_all("all => all.map(e => e.classList[1])") == [
        *("user", "assistant", "left-out", "user", "assistant"),
    ]
    assert api.asked() == f"<user>{'w' * 30}<assistant>"
    api.restart()


def test_the_page_scrolls_along_and_lets_one_scroll_back(tab: Tab, api: Api) -> None:
    api.answers("hello world\n\n" * 120, delay=0.01)
    tab.send("long")
    scroll = (
        "(() => {const s = document.getElementById('scroll'); return [s.scrollTop, "
        "s.scrollHeight - s.clientHeight]})()"
    )
    wait_for(lambda: tab.page.evaluate(scroll)[1] > 300, "it is longer than the page")
    wait_for(lambda: (p := tab.page.evaluate(scroll))[1] - p[0] < 5, "it scrolls along")
    composer = tab.page.locator("#composer").bounding_box()
    assert composer["y"] + composer["height"] <= 760, "the composer stays below"
    # The page may scroll once more before it hears of this; users' wheels go on turning.
    back = "document.getElementById('scroll').scrollTop = 50"

    def lets_go() -> bool:
        tab.page.evaluate(back)
        time.sleep(0.1)
        return tab.page.evaluate(scroll)[0] == 50

    wait_for(lets_go, "it lets go")
    time.sleep(0.4)
    assert tab.page.evaluate(scroll)[0] == 50, "it stays where the user is"
    tab.page.click("#down")
    wait_for(lambda: (p := tab.page.evaluate(scroll))[1] - p[0] < 5, "and back to the end")
    tab.page.keyboard.press("Escape")
    tab.idle()


def test_the_key_is_asked_once_and_kept_in_the_session(tab: Tab, api: Api, browser: Any) -> None:
    api.answers("hello")
    api.restart(key="s3cret")
    tab.page.reload()
    tab.page.locator("#key[open]").wait_for(timeout=SECONDS)
    tab.page.fill("#key-value", "s3cret")
    tab.page.keyboard.press("Enter")
    tab.is_in("ok")
    tab.ask("hi", "hello")
    tab.reload()
    tab.ask("again", "hello")
    kept = "JSON.stringify([localStorage, document.cookie])"
    assert "s3cret" not in tab.page.evaluate(kept)
    api.restart()


def test_chinese_dark_phone_and_keyboard(browser: Any, chromium: Any, api: Api, server) -> None:
    context = chromium.new_context(
        locale="zh-CN", color_scheme="dark", viewport={"width": 390, "height": 700}
    )
    api.answers("hello")
    tab = Tab(context, server.page_url).goto()
    assert tab.page.get_attribute("html", "lang") == "zh-CN"
    assert tab.page.get_attribute("html", "data-theme") == "dark"
    tab.page.keyboard.type("one")  # the composer has the focus
    tab.page.keyboard.press("Enter")
    wait_for(lambda: tab.answer == "hello", "the answer")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 390
    tab.page.get_by_role("button", name="对话列表").click()
    tab.page.select_option("#language", "en")
    assert tab.page.get_by_role("button", name="New conversation").first.is_visible()
    tab.page.keyboard.press("Escape")
    assert tab.page.locator("nav").is_hidden()
    unnamed = (
        "[...document.querySelectorAll('button, input:not([hidden]), select, textarea')]"
        ".filter(e => !e.textContent && !e.ariaLabel && !e.labels?.length).map(e => e.outerHTML)"
    )
    assert tab.page.evaluate(unnamed) == [], "everything has a name for screen readers"
    tab.close()
    context.close()


def test_an_answer_that_was_cut_goes_on(tab: Tab, api: Api) -> None:
    api.answers("hello")
    tab.page.fill("#set-max_tokens", "1")
    tab.ask("x", "hello")
    assert "Cut off by the length limit. Continue" in tab.notes
    tab.page.fill("#set-max_tokens", "")
    api.answers(" *world*")
    tab.do("go_on")
    wait_for(lambda: tab.answer == "hello world", "it goes on, formatted as one")
    tab.idle()
    assert api.asked() == "<user>x<assistant>hello"
    tab.reload()
    wait_for(lambda: tab.answers == ["hello world"], "and is kept as one")


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_tools_are_shown_as_calls(tab: Tab, api: Api) -> None:
    api.answers(CALL)
    tab.page.fill("#set-tools", "[1")
    tab.send("x")
    tab.page.get_by_text("a JSON list of functions").wait_for(timeout=SECONDS)
    tab.page.fill("#set-tools", json.dumps([TOOL]))
    tab.send("How is it in Oslo?")
    call = tab.page.locator(".call")
    wait_for(lambda: call.count() == 1, "the call")
    tab.idle()
    assert call.locator("strong").text_content() == "Calls weather"
    assert json.loads(call.locator("pre").text_content()) == {"city": "Oslo"}
    assert tab.page.get_attribute("#message", "placeholder") == "Result of weather"
    api.answers("Sunny.")
    tab.send("21 °C")
    wait_for(lambda: tab.answer == "Sunny.", "the answer")
    assert tab.page.locator(".turn.tool .typed").text_content() == "21 °C"


def test_probabilities_on_demand(tab: Tab, api: Api) -> None:
    api.answers("hello world")
    tab.page.check("#set-logprobs")
    tab.ask("x", "hello world")
    tokens = tab.page.locator(".turn .token")
    assert tokens.all_text_contents()[:2] == ["hello", " world"]
    assert tokens.nth(0).get_attribute("class") == "token sure-3"
    assert '"hello" 77.9 %' in tokens.nth(0).get_attribute("title")
    tab.do("rendered")
    wait_for(lambda: tokens.count() == 0 and tab.answer == "hello world", "formatted")
    tab.do("raw")
    wait_for(lambda: tab.page.locator(".turn.assistant .plain").count() == 1, "raw")
