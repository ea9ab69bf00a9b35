"""How texts of all kinds lie on the chat page, and how one gets around on it without a mouse."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from chat_browser import Api, Tab, wait_for
from serving_process import ServerProcess

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]


@pytest.fixture
def phone(chromium: Any, api: Api, server: ServerProcess) -> Iterator[Tab]:
    context = chromium.new_context(locale="en-GB", viewport={"width": 390, "height": 700})
    tab = Tab(context, server.page_url).goto()
    yield tab
    tab.close()
    context.close()


def test_words_and_formulas_in_tables_stay_whole(phone: Tab, api: Api) -> None:
    names = ["Algorithm", "Average", "Memory", "Properties", "Description"]
    row = "|".join(["Mergesort", r"$n \log n$", "linear", "stable", "external sorting"])
    api.answers(f"|{'|'.join(names)}|\n|{'---|' * 5}\n|{row}|\n")
    phone.send("x")
    phone.page.locator(".turn.assistant td").nth(4).wait_for()
    phone.idle()
    table = phone.page.locator(".turn.assistant table")
    heights = table.locator("th").evaluate_all("all => all.map(e => e.clientHeight)")
    assert max(heights) < 45, "one line each"
    assert table.evaluate("e => e.scrollWidth > e.clientWidth"), "it scrolls instead"
    assert table.locator("math").evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390


def test_each_paragraph_runs_as_its_language_does(tab: Tab, api: Api) -> None:
    api.answers("שלום עולם\n\nhello\n\n- אחת\n\n```\nשלום x = 1\n```\n")
    question = "שלום hello there, how is it going today?"
    tab.page.fill("#message", question)
    assert tab.page.locator("#message").evaluate("e => getComputedStyle(e).direction") == "rtl"
    tab.page.keyboard.press("Enter")
    tab.idle()
    wait_for(lambda: tab.questions == [question], "the question")
    side = (
        "e => { const text = document.createTreeWalker(e, NodeFilter.SHOW_TEXT).nextNode(), r = "
        "document.createRange(); r.setStart(text, 0); r.setEnd(text, 4); const box = e"
        ".getBoundingClientRect(), at = r.getBoundingClientRect(); return at.left - box.left > "
        "box.right - at.right ? 'right' : 'left'; }"
    )
    paragraphs = tab.page.locator(".turn.assistant .block p")
    wait_for(lambda: paragraphs.count() == 2, "the answer")
    assert paragraphs.nth(0).evaluate(side) == "right"
    assert paragraphs.nth(1).evaluate(side) == "left"
    point = tab.page.locator(".turn.assistant ul")
    assert point.evaluate("e => getComputedStyle(e).direction") == "rtl", "its point to the right"
    assert tab.page.locator(".turn.assistant pre").evaluate(side) == "left", "code does not turn"
    assert tab.page.locator(".turn.user .typed").evaluate(side) == "right"


def test_titles_are_cut_between_characters(tab: Tab, api: Api) -> None:
    api.answers("hello")
    tab.ask("a" * 59 + "\U0001f600" * 3, "hello")
    assert tab.page.locator("#list .name").text_content() == "a" * 59 + "\U0001f600"


def test_the_keyboard_goes_into_drawers_and_out_of_them(phone: Tab, api: Api) -> None:
    keyboard = phone.page.keyboard

    def focused() -> str:
        return str(phone.page.evaluate("document.activeElement.id || document.activeElement.title"))

    for name in ("conversations", "settings"):
        opener = phone.page.locator(f"#open-{name}")
        opener.focus()
        keyboard.press("Enter")
        assert opener.get_attribute("aria-expanded") == "true" and focused() == "Close"
        assert phone.page.locator(f"#{name}").evaluate("e => e.contains(document.activeElement)")
        keyboard.press("Escape")
        assert opener.get_attribute("aria-expanded") == "false" and focused() == f"open-{name}"
        assert phone.page.locator(f"#{name}").is_hidden()


def test_escape_closes_a_menu_and_not_the_answer(tab: Tab, api: Api) -> None:
    api.answers("hello world " * 100, delay=0.02)
    tab.send("x")
    wait_for(lambda: tab.answer != "", "it begins")
    tab.page.locator("#list summary").focus()
    tab.page.keyboard.press("Enter")
    tab.page.locator("#list details[open]").wait_for()
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Escape")
    assert tab.page.locator("#list details[open]").count() == 0
    assert tab.page.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert tab.page.locator("#stop").is_visible()
    tab.page.keyboard.press("Escape")
    tab.idle()


def test_keys_of_an_input_method_are_its_own(tab: Tab, api: Api) -> None:
    """Enter takes a candidate and Escape leaves them, in Safari after its composition's end."""

    def press(key: str, where: str, **how: Any) -> None:
        script = "(e, [key, how]) => e.dispatchEvent(new KeyboardEvent('keydown', {key, ...how}))"
        tab.page.locator(where).evaluate(
            script, [key, {"bubbles": True, "cancelable": True, **how}]
        )

    api.answers("hello world " * 100, delay=0.02)
    tab.page.fill("#message", "你好")
    for how in ({"isComposing": True}, {"keyCode": 229}):
        press("Enter", "#message", **how)
    assert tab.questions == [] and tab.draft == "你好"
    press("Enter", "#message")
    wait_for(lambda: tab.answer != "", "it begins")
    for how in ({"isComposing": True}, {"keyCode": 229}):
        press("Escape", "#message", **how)
    tab.page.fill("#search", "你")
    press("Escape", "#search")
    time.sleep(0.3)
    assert tab.page.locator("#stop").is_visible() and api.engine.running == 1
    press("Escape", "#message")
    tab.idle()
    tab.do("edit", ".turn.user")
    for key in ("Enter", "Escape"):
        press(key, ".editing", isComposing=True)
    assert tab.page.locator(".editing").is_visible() and len(api.engine.calls) == 1


def test_the_first_paint_has_the_chosen_colours(chromium: Any, server: ServerProcess) -> None:
    """Without its modules, which come later."""
    context = chromium.new_context(color_scheme="dark", locale="en-GB")
    ground = "getComputedStyle(document.body).backgroundColor"
    page = context.new_page()
    page.route("**/app.js", lambda route: route.abort())
    page.goto(server.page_url)
    assert page.evaluate(ground) == "rgb(22, 24, 29)", "as the system has it"
    page.unroute("**/app.js")
    page.goto(server.page_url)
    page.select_option("#theme", "light")
    page.route("**/app.js", lambda route: route.abort())
    page.reload()
    assert page.evaluate(ground) == "rgb(255, 255, 255)", "as the user has it"
    context.close()
