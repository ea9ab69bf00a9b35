"""The chat page's client and the events that its browser hears, on a real socket."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import TEMPLATE, FakeTokenizer, LocalWorker, make_served

from llm.serving.api import create_app
from llm.serving.keys import Keys
from llm.serving.listening import listen, local_url
from llm.serving.page.answers import Asked, answer
from llm.serving.page.client import ApiClient
from llm.serving.requests import Limits
from llm.serving.steps import Loaded
from llm.serving.web import ApiSettings
from llm.serving.wsgi import HttpServer, Site


@pytest.fixture
def serve() -> Iterator:
    started = []

    def start(served: Loaded, api_key: str | None = None, limits: tuple[int, int] = (100, 50)):
        worker = LocalWorker(lambda: served, max_queue=2)
        worker.start()
        worker.wait_loaded()
        app = create_app(worker, ApiSettings(Limits(*limits), keys=Keys(single=api_key)))
        site = Site(app, listen("127.0.0.1", 0, "flask_port"))
        server = HttpServer([site], max_requests=6, max_body_bytes=1 << 20)
        server.start()
        started.append((worker, server))
        return local_url("127.0.0.1", site.port)

    yield start
    for worker, server in started:
        worker.close()
        server.stop()


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": messages, "temperature": 0, **fields}


def hear(url: str, body: dict[str, Any], key: str = "", **asked: Any) -> list[dict[str, Any]]:
    async def all_events() -> list[dict[str, Any]]:
        route = "chat" if "messages" in body else "completions"
        question = Asked(route, body, **{"context": 200, **asked})
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return [event async for event in answer(ApiClient(url), question, headers)]

    return asyncio.run(all_events())


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "text")


def shown(events: list[dict[str, Any]]) -> str:
    blocks: list[str] = []
    for event in events:
        if "html" in event:
            blocks[event["from"] :] = event["html"]
    return "".join(blocks)


def test_text_html_and_the_end(serve) -> None:
    events = hear(serve(make_served("hello\u2028 *world* 中")), chat("hi"))
    assert text_of(events) == "hello\u2028 *world* 中", "U+2028 does not cut an event"
    assert shown(events) == "<p>hello\u2028 <em>world</em> 中</p>\n"
    end = events[-1]
    assert (end["type"], end["finish"]) == ("end", "stop")
    assert end["usage"]["completion_tokens"] == len("\u2028 *world* 中".encode()) + 2
    assert 0 < end["first"] <= end["seconds"]
    texts = [event for event in events if event["type"] == "text"]
    assert all(0 < event["first"] <= event["seconds"] <= end["seconds"] for event in texts)
    assert texts[-1]["usage"] == end["usage"], "an answer that is stopped has figures, too"


def test_the_key_is_passed_on(serve) -> None:
    url = serve(make_served("hello"), api_key="k")
    assert text_of(hear(url, chat("hi"), key="k")) == "hello"
    (event,) = hear(url, chat("hi"))
    assert (event["type"], event["status"]) == ("error", 401)
    assert "this server needs a key" in event["message"]


def test_events_come_while_the_answer_is_generated_and_few_enough_to_draw(serve) -> None:
    events = hear(serve(make_served("abcdefghij" * 5, delay=0.01)), chat("hi", max_tokens=50))
    assert text_of(events) == "abcdefghij" * 5
    assert 3 <= len(events) <= 25, "neither all at once nor one for every token"


def test_leaving_stops_the_server_before_the_first_word(serve, tmp_path) -> None:
    served = make_served("hello world", gate=str(tmp_path))
    url = serve(served)

    async def leave() -> None:
        events = answer(ApiClient(url), Asked("chat", chat("hi"), 200), {})
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(events), 0.3)
        await events.aclose()

    asyncio.run(leave())
    assert served.engine.steps == 0, "nobody waited for a word"
    # The server hears of it within a tenth of a second, at most one token later.
    for position in range(2):
        (tmp_path / str(position)).touch()
        deadline = time.monotonic() + 0.5
        while served.engine.handles and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not served.engine.handles
    assert served.engine.steps <= 2


def test_errors(serve) -> None:
    *_, event = hear(serve(make_served(fail_at=1)), chat("hi"))
    assert event["type"] == "error" and "a kernel broke" in event["message"]
    (event,) = hear(serve(make_served()), chat("hi", max_tokens=51))
    assert "at most 50 tokens" in event["message"]
    (event,) = hear("http://127.0.0.1:1", chat("hi"))
    assert event["code"] == "gone"


def test_an_answer_that_breaks_off() -> None:
    half = b'data: {"choices": [{"text": "half"}]}\n\n'
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reply() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + half)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # closing on unread bytes would be a reset
                    pass

        threading.Thread(target=reply, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        first, event = hear(url, {"prompt": "x"})
    assert first["text"] == "half"
    assert (event["type"], event["code"]) == ("error", "broke_off")


def test_a_text_goes_on_without_a_chat_template(serve) -> None:
    served = make_served(tokenizer=FakeTokenizer(chat_template=None))
    events = hear(serve(served), {"prompt": "a **b", "max_tokens": 20}, prefix="**b")
    assert text_of(events) == "hello world"
    assert shown(events) == "<p>**bhello world</p>\n", "the HTML is that of the whole answer"


def test_the_oldest_turns_leave_when_the_context_is_full(serve) -> None:
    served = make_served("hello", tokenizer=FakeTokenizer(chat_template=TEMPLATE))
    body = chat(*["q" * 30, "a" * 30] * 3, "last?")
    body["messages"].insert(0, {"role": "system", "content": "Be brief."})
    first, *events = hear(serve(served, limits=(150, 50)), body)
    assert first == {"type": "left_out", "messages": 4}
    assert text_of(events) == "hello"
    ((ids, _),) = served.engine.calls
    said = served.model.tokenizer.decode(ids)
    assert said == f"<system>Be brief.<user>{'q' * 30}<assistant>{'a' * 30}<user>last?<assistant>"


def test_an_answer_is_shortened_before_a_turn_leaves(serve) -> None:
    served = make_served("hello", longest=100, max_model_len=100)
    url = serve(served, limits=(90, 80))
    assert hear(url, chat("q" * 20, "a" * 5, "x", max_tokens=80), context=100)[-1]["type"] == "end"
    ((ids, params),) = served.engine.calls
    assert params.max_new_tokens == 100 - len(ids), "as long as there is room"
    assert served.model.tokenizer.decode(ids).startswith("<user>qqq")


def test_one_question_that_is_too_long_is_an_error(serve) -> None:
    (event,) = hear(serve(make_served()), chat("q" * 300))
    assert event["code"] == "context_length_exceeded"
    assert "the limit is 100" in event["message"]


def test_chinese_takes_three_bytes_a_character_of_what_the_api_takes(serve) -> None:
    (event,) = hear(serve(make_served()), chat("\u4e2d" * 300_000))
    assert event["code"] == "context_length_exceeded", "900,000 bytes are within its limit"


def test_probabilities_of_tokens(serve) -> None:
    events = hear(serve(make_served("hello world")), chat("hi", logprobs=True))
    tokens = [token for event in events for token in event.get("tokens", ())]
    assert [(text, value) for text, value, _ in tokens][:2] == [("hello", -0.25), (" world", -0.5)]


def test_status(serve) -> None:
    async def status(url: str, key: str = "") -> dict[str, Any]:
        return await ApiClient(url).status({"Authorization": f"Bearer {key}"} if key else {})

    url = serve(make_served(), api_key="k")
    assert asyncio.run(status(url))["state"] == "key"
    found = asyncio.run(status(url, "k"))
    assert (found["state"], found["running"], found["waiting"]) == ("ok", 0, 0)
    assert [model["id"] for model in found["models"]] == ["fake-llama"]
    assert asyncio.run(status("http://127.0.0.1:1"))["state"] == "gone"
