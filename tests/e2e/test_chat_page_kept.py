"""What a user has written or given a name on the chat page stays, whatever happens around it, and
is found again."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from chat_browser import SECONDS, Api, Tab, wait_for
from serving_process import ServerProcess

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]


def names(tab: Tab) -> list[str]:
    return list(tab.page.locator("#list .name").all_text_contents())


def choose(tab: Tab, word: str) -> None:
    tab.page.locator("#list summary").first.click()
    tab.page.locator(f"#list details[open] [data-word={word}]").click()


def begin(tab: Tab, api: Api) -> None:
    api.answers("hello world " * 100, delay=0.03)
    tab.send("one")
    wait_for(lambda: tab.answer != "", "it begins")


def test_a_conversation_that_is_deleted_in_mid_answer_stays_away(tab: Tab, api: Api) -> None:
    begin(tab, api)
    tab.page.on("dialog", lambda dialog: dialog.accept())
    choose(tab, "remove")
    wait_for(lambda: names(tab) == [] and tab.questions == [], "it is gone")
    tab.reload()
    assert names(tab) == []


def test_a_conversation_that_another_tab_deletes_stays_away(
    tab: Tab, browser: Any, api: Api
) -> None:
    begin(tab, api)
    other = Tab(browser, tab.url).goto()
    other.page.on("dialog", lambda dialog: dialog.accept())
    choose(other, "remove")
    wait_for(lambda: api.engine.running == 0, "the engine stops")
    wait_for(lambda: names(tab) == [] and tab.questions == [], "it is gone where it was answered")
    other.reload()
    assert names(other) == []
    other.close()


@pytest.mark.long
def test_an_answer_is_stopped_from_another_tab(tab: Tab, browser: Any, api: Api) -> None:
    begin(tab, api)
    other = Tab(browser, tab.url).goto("/#" + tab.page.url.partition("/#")[2])
    wait_for(lambda: other.answer != "", "it is seen there")
    other.page.click("#stop")
    wait_for(lambda: api.engine.running == 0, "the engine stops")
    for each in (tab, other):
        each.idle()
        assert "Stopped. Continue" in each.notes
    other.close()


@pytest.mark.long
def test_a_conversation_that_is_deleted_before_its_first_word_stays_away(
    tab: Tab, api: Api
) -> None:
    api.answers("hello")
    tab.ask("one", "hello")
    api.answers("hello", delay=1.0)
    tab.send("two")
    wait_for(lambda: api.engine.running == 1, "it runs")
    tab.page.on("dialog", lambda dialog: dialog.accept())
    choose(tab, "remove")
    wait_for(lambda: names(tab) == [] and tab.questions == [], "it is gone")
    wait_for(lambda: api.engine.running == 0, "the engine stops")
    tab.reload()
    assert names(tab) == []


def test_a_question_goes_where_the_user_is(tab: Tab, api: Api) -> None:
    """Reading a conversation takes a moment, in which a fast user, or a slow disk, is elsewhere."""
    api.answers("hello")
    tab.ask("one", "hello")
    at_once = (
        "([where, text]) => { document.querySelector(where).click(); const m = document"
        ".getElementById('message'); m.value = text; m.dispatchEvent(new Event('input')); "
        "document.getElementById('send').click(); }"
    )
    tab.page.evaluate(at_once, ["#new", "two"])
    wait_for(lambda: tab.questions == ["two"] and tab.answer == "hello", "in a new one")
    assert api.asked() == "<user>two<assistant>"
    tab.idle()
    tab.page.evaluate(at_once, ["#list li:last-child .name", "three"])
    wait_for(lambda: tab.answers == ["hello"] * 2, "in the first")
    assert tab.questions == ["one", "three"]
    assert api.asked() == "<user>one<assistant>hello<user>three<assistant>"
    tab.idle()
    both = "for (const at of [0, 1]) document.querySelectorAll('#list .name')[at].click()"
    tab.page.evaluate(both)
    wait_for(lambda: tab.questions == ["two"], "the one that was chosen last")
    time.sleep(0.3)
    assert tab.questions == ["two"] and sorted(names(tab)) == ["one", "two"]


def test_an_answer_grows_while_another_conversation_is_shown(tab: Tab, api: Api) -> None:
    api.answers("*hello*")
    tab.ask("one", "hello")
    tab.page.click("#new")
    paragraphs = [f"paragraph {number}" for number in range(12)]
    api.answers("\n\n".join(paragraphs), delay=0.006)
    tab.send("two")
    wait_for(lambda: "paragraph 2" in tab.answer, "it begins")
    tab.page.route("**/render", lambda route: route.abort())  # what came is known, and all of it
    tab.page.locator("#list .name").nth(1).click()
    wait_for(lambda: tab.questions == ["one"] and tab.answer == "hello", "the other")
    time.sleep(0.3)
    assert tab.answer == "hello", "nothing of it is written there"
    tab.page.locator("#list .name").nth(0).click()
    tab.idle()
    wait_for(lambda: tab.answer.split("\n") == paragraphs, "nothing is missing")


@pytest.mark.long
def test_another_tab_shows_an_answer_formatted_as_it_grows(
    tab: Tab, browser: Any, api: Api
) -> None:
    api.answers("some *words*\n\n" * 12, delay=0.006)
    tab.send("one")
    wait_for(lambda: tab.answer != "", "it begins")
    other = Tab(browser, tab.url).goto("/#" + tab.page.url.partition("/#")[2])
    other.page.locator(".turn.assistant em").first.wait_for(timeout=SECONDS)
    other.page.evaluate(
        "() => { window.raw = 0; new MutationObserver(() => { window.raw += document"
        ".querySelectorAll('.turn.assistant .plain').length; }).observe(document"
        ".getElementById('turns'), { childList: true, subtree: true }); }"
    )
    tab.idle()
    wait_for(lambda: other.answer == tab.answer, "whole in both")
    assert other.page.evaluate("window.raw") == 0, "Markdown is not shown raw in between"
    other.close()


def test_a_browser_that_forbids_to_keep_anything(chromium: Any, api: Api, server: Any) -> None:
    """As Chromium does where the user blocks all site data."""
    context = chromium.new_context(locale="en-GB")
    refuse = "() => { throw new DOMException('denied', 'SecurityError'); }"
    for name in ("localStorage", "sessionStorage"):
        context.add_init_script(f"Object.defineProperty(window, '{name}', {{ get: {refuse} }})")
    context.add_init_script(
        f"indexedDB.open = {refuse}; LockManager.prototype.request = LockManager.prototype.query "
        "= () => Promise.reject(new DOMException('denied', 'SecurityError'))"
    )
    tab = Tab(context, server.page_url).goto()
    tab.page.get_by_text("does not keep conversations (denied)").wait_for(timeout=SECONDS)
    api.answers("hello")
    tab.page.fill("#set-top_k", "7")
    tab.ask("one", "hello")
    tab.ask("two", "hello")
    assert api.engine.calls[-1][1].top_k == 7
    tab.page.click("#new")
    tab.ask("three", "hello")
    assert names(tab) == ["three", "one"], "for as long as the tab is open"
    tab.close()
    context.close()


def test_conversations_that_are_cleared_under_an_open_tab(tab: Tab, api: Api) -> None:
    api.answers("hello")
    tab.ask("one", "hello")
    browsing = tab.page.context.new_cdp_session(tab.page)
    everything = {"origin": tab.url, "storageTypes": "all"}
    browsing.send("Storage.clearDataForOrigin", everything)
    tab.ask("two", "hello")
    tab.reload()
    wait_for(lambda: tab.questions == ["one", "two"], "what the tab had is kept again")


def test_a_key_that_was_not_confirmed_is_none(tab: Tab, api: Api) -> None:
    api.restart(key="s3cret")
    tab.is_in("key")
    tab.page.fill("#key-value", "s3cr")
    tab.page.keyboard.press("Escape")
    assert "s3cr" not in tab.page.evaluate("JSON.stringify(sessionStorage)")
    tab.send("one")
    tab.page.locator("#key[open]").wait_for(timeout=SECONDS)
    assert tab.draft == "one" and tab.questions == []
    api.restart()
    tab.is_in("ok")
    assert tab.page.locator("#key[open]").count() == 0, "nobody wants one any more"


def test_a_key_counts_from_when_it_is_given(tab: Tab, api: Api) -> None:
    """What was asked without it, and is answered late, says nothing about it."""
    api.answers("hello")
    api.restart(key="s3cret")
    tab.is_in("key")
    held: list[Any] = []

    def hold(route: Any) -> None:
        if "authorization" in route.request.headers:
            route.continue_()
        else:
            held.append(route)

    tab.page.route("**/status", hold)
    tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    wait_for(lambda: tab.page.evaluate("1") == 1 and held != [], "it is asked without a key")
    tab.page.fill("#key-value", "s3cret")
    tab.page.keyboard.press("Enter")
    tab.page.locator('#status[data-state="ok"]').wait_for(timeout=SECONDS)
    held.pop().continue_()
    time.sleep(0.3)
    assert tab.page.locator("#key[open]").count() == 0
    tab.ask("one", "hello")
    tab.page.unroute("**/status")
    api.restart()


@pytest.mark.long
def test_a_title_given_in_mid_answer_stays(tab: Tab, browser: Any, api: Api) -> None:
    begin(tab, api)
    tab.page.click("#new")
    choose(tab, "rename")
    tab.page.locator("#list input").fill("mine")
    tab.page.keyboard.press("Enter")
    wait_for(lambda: names(tab) == ["mine"], "the new title")
    other = Tab(browser, tab.url).goto()
    assert names(other) == ["mine"]
    choose(other, "rename")
    other.page.locator("#list input").press_sequentially("theirs", delay=100)
    other.page.keyboard.press("Enter")
    wait_for(lambda: names(tab) == ["theirs"], "the answer's own tab has heard of it")
    api.engine.delay = 0
    tab.page.locator("#list .name").click()
    tab.idle()
    other.reload()
    assert names(other) == ["theirs"]
    other.close()


def test_the_browsers_buttons_go_between_conversations(tab: Tab, api: Api) -> None:
    api.answers("hello")
    for question in ("one", "two"):
        tab.page.click("#new")
        tab.ask(question, "hello")
    assert tab.page.title().startswith("two")
    tab.page.locator("#list .name").nth(1).click()
    wait_for(lambda: tab.questions == ["one"], "from the list")
    tab.page.go_back()
    wait_for(lambda: tab.questions == ["two"], "back")
    tab.page.go_back()
    wait_for(lambda: tab.questions == ["one"] and tab.page.title().startswith("one"), "and back")
    tab.page.go_forward()
    wait_for(lambda: tab.questions == ["two"], "forward")
    tab.reload()
    wait_for(lambda: tab.questions == ["two"], "the same one")


def test_the_list_is_searched(tab: Tab, api: Api) -> None:
    names = tab.page.locator("#list .name")
    for question, answer in (("red", "an apple"), ("yellow", "A Banana")):
        api.answers(answer)
        tab.page.click("#new")
        tab.ask(question, answer)
    assert tab.page.locator("#list .group").all_text_contents() == ["Today"]
    tab.page.fill("#search", "banana")
    wait_for(lambda: names.all_text_contents() == ["yellow"], "what answers say counts")
    tab.page.fill("#search", "RED")
    wait_for(lambda: names.all_text_contents() == ["red"], "and what was asked")
    tab.page.fill("#search", "blue")
    tab.page.get_by_text("Nothing found.").wait_for(timeout=SECONDS)
    tab.page.fill("#search", "")
    wait_for(lambda: names.all_text_contents() == ["yellow", "red"], "all of them")


def test_a_question_that_is_being_edited_stays(tab: Tab, api: Api) -> None:
    api.answers("hello")
    tab.ask("one", "hello")
    tab.do("edit", ".turn.user")
    tab.page.fill(".editing", "a long")
    api.http.stop()
    tab.is_in("gone")
    api.start()
    tab.is_in("ok")
    tab.page.keyboard.type(" one")
    tab.page.fill("#set-top_k", "2.5")
    tab.page.click(".do-saveSend")
    tab.page.get_by_text("Top-k").last.wait_for(timeout=SECONDS)
    assert tab.page.input_value(".editing") == "a long one" and len(api.engine.calls) == 1
    tab.page.fill("#set-top_k", "")
    tab.page.click(".do-saveSend")
    wait_for(lambda: tab.questions == ["a long one"] and tab.answer == "hello", "it is sent")
    assert not tab.page.locator(".editing").count()


def test_a_full_disk_is_said_and_the_conversation_goes_on(tab: Tab, api: Api) -> None:
    api.answers("hello")
    full = "() => { throw new DOMException('no room', 'QuotaExceededError'); }"
    tab.page.evaluate(
        f"() => {{ window.put = IDBObjectStore.prototype.put; "
        f"IDBObjectStore.prototype.put = {full}; }}"
    )
    tab.ask("one", "hello")
    tab.page.get_by_text("does not keep conversations (no room)").wait_for(timeout=SECONDS)
    assert names(tab) == ["one"]
    tab.page.evaluate("() => { IDBObjectStore.prototype.put = window.put; }")
    tab.ask("two", "hello")
    assert not tab.page.locator("#errors").inner_text()
    tab.reload()
    wait_for(lambda: tab.questions == ["one", "two"], "kept when there was room")


def test_files_that_no_page_has_exported_are_refused(tab: Tab, tmp_path: Path) -> None:
    turn = {"id": 1, "parent": 0, "role": "assistant", "text": "hello"}
    wrong = {"calls": "x", "rate": "fast", "tokens": [1], "usage": 5, "text": 5, "unknown": 1}
    file = tmp_path / "chat.json"
    for name, value in wrong.items():
        turns = [{**turn, name: value}]
        kind = "llama-paddle-suite conversation"
        file.write_text(json.dumps({"kind": kind, "conversation": {"turns": turns, "chosen": {}}}))
        tab.page.set_input_files("#import-file", file)
        tab.page.get_by_text(f"(turns: {name})").wait_for(timeout=SECONDS)
    assert names(tab) == []


def test_odd_keys_and_characters_are_the_apis_to_judge(tab: Tab, api: Api) -> None:
    api.restart(key="secret-key")
    tab.is_in("key")
    tab.page.fill("#key-value", "密钥 é")
    tab.page.keyboard.press("Enter")
    tab.page.locator("#key-wrong").wait_for(timeout=SECONDS)
    assert tab.page.locator("#status").get_attribute("data-state") == "key"
    api.restart()
    tab.is_in("ok")
    tab.page.keyboard.press("Escape")
    tab.page.evaluate("() => { document.getElementById('message').value = 'half \\ud83d'; }")
    tab.page.focus("#message")
    tab.page.keyboard.press("Enter")
    wait_for(lambda: any("surrogates" in note for note in tab.notes), "the API's own words")


def test_a_text_that_is_too_long_is_refused_at_once(tab: Tab, browser: Any) -> None:
    browser.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.fill("#message", "kept ")
    tab.page.evaluate("navigator.clipboard.writeText('word '.repeat(4e5))")
    begin = time.monotonic()
    tab.page.keyboard.press("Control+V")
    tab.page.get_by_text("2,000,005 characters are more than a text may have").wait_for()
    assert time.monotonic() - begin < 3
    assert tab.draft == "kept "
    tab.page.keyboard.type("and on")
    assert not tab.page.inner_text("#errors") and tab.draft == "kept and on"


def test_requests_that_are_none(server: ServerProcess) -> None:
    def said(content: bytes, kind: str = "application/json") -> str:
        url, headers = f"{server.page_url}/answer", {"Content-Type": kind}
        response = requests.post(url, data=content, headers=headers, timeout=30)
        assert response.status_code == 400
        return str(response.json()["error"]["message"])

    assert "of 33554436 bytes is more than 33554432" in said(b"[" + b" " * (32 << 20) + b"1 ]")
    assert said(b"[]") == "a JSON object is wanted" == said(b"{")
    assert "application/json" in said(b"{}", "text/plain")
    assert "'id' is null; 24 to 64 hexadecimal digits" in said(b'{"route": "chat"}')
    name, url = "a" * 24, server.page_url
    for route in ("follow", "stop"):
        response = requests.post(f"{url}/{route}", json={"id": name}, timeout=30)
        assert response.status_code == 404 and "no answer aaa" in response.text
    asked = {"id": name, "route": "chat", "body": {"messages": []}, "context": 9}
    headers = {"Authorization": "Bearer k"}
    assert requests.post(f"{url}/answer", json=asked, timeout=30).status_code == 200
    again = requests.post(f"{url}/answer", json=asked, timeout=30)
    assert "has been asked for before" in again.json()["error"]["message"]
    other = requests.post(f"{url}/follow", json={"id": name}, headers=headers, timeout=30)
    assert other.status_code == 404, "another user's key"
    texts = requests.post(f"{server.page_url}/render", json={"texts": ["\ud83d"]}, timeout=30)
    assert "\ud83d" in texts.json()["html"][0][0]
