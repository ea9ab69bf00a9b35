"""The chat page's HTTP client on a real socket, and the arguments of the server."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from fakes import FakeTokenizer, make_served

from common.errors import UserError
from common.flags import load
from llm.config.serving import ServerArguments
from llm.serving.api import ApiSettings, create_app
from llm.serving.loop import EngineWorker, Served
from llm.serving.page.client import ApiDownError, ChatClient
from llm.serving.requests import Limits
from llm.serving.wsgi import HttpServer, local_url

ASK = [{"role": "user", "content": "hi"}]
HOW = {"temperature": 0.0, "max_tokens": 20}


@pytest.fixture
def serve() -> Iterator:
    started = []

    def start(served: Served, api_key: str | None = None) -> str:
        worker = EngineWorker(lambda: served, max_queue=2)
        worker.start()
        worker.wait_loaded()
        app = create_app(worker, ApiSettings(Limits(100, 50), api_key=api_key))
        server = HttpServer(app, host="127.0.0.1", port=0, max_requests=6, max_body_bytes=1 << 20)
        server.start()
        started.append((worker, server))
        return local_url("127.0.0.1", server.port)

    yield start
    for worker, server in started:
        worker.close()
        server.stop()


def test_streams_a_chat(serve) -> None:
    client = ChatClient(serve(make_served("hello\u2028 world 中"), api_key="k"), "k")
    assert client.model().max_new_tokens == 50
    assert "".join(client.stream(ASK, **HOW)) == "hello\u2028 world 中", (
        "U+2028 does not cut an event"
    )


def test_pieces_come_while_the_answer_is_generated_and_few_enough_to_draw(serve) -> None:
    served = make_served("abcdefghij" * 5, delay=0.01)
    pieces = list(ChatClient(serve(served)).stream(ASK, temperature=0.0, max_tokens=50))
    assert "".join(pieces) == "abcdefghij" * 5
    assert 2 <= len(pieces) <= 25, "neither all at once nor one for every token"


def test_stop_ends_it_before_the_first_word(serve, tmp_path) -> None:
    served = make_served("hello world", gate=str(tmp_path))
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert list(ChatClient(serve(served)).stream(ASK, **HOW, stop=stop)) == []
    assert served.engine.steps == 0, "nobody waited for a word"
    # The server hears of it with the first chunk, at most one token later.
    for position in range(2):
        (tmp_path / str(position)).touch()
        deadline = time.monotonic() + 5
        while served.engine.running and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not served.engine.running
    assert served.engine.steps <= 2


def test_continues_text_without_a_chat_template(serve) -> None:
    served = make_served(tokenizer=FakeTokenizer(chat_template=None))
    assert "".join(ChatClient(serve(served)).stream(ASK, **HOW)) == "hello world"
    (ids, _), *_ = served.engine.calls
    assert served.model.tokenizer.decode(ids) == "hi"


def test_errors_are_for_the_user(serve) -> None:
    url = serve(make_served(fail_at=1), api_key="k")
    with pytest.raises(ApiDownError, match="this server needs a key"):
        ChatClient(url).model()
    with pytest.raises(ApiDownError, match="a kernel broke"):
        list(ChatClient(url, "k").stream(ASK, **HOW))
    with pytest.raises(ApiDownError, match="at most 50 tokens"):
        list(ChatClient(url, "k").stream(ASK, temperature=0.0, max_tokens=51))


def test_nobody_listens() -> None:
    with pytest.raises(ApiDownError, match="does not answer"):
        ChatClient("http://127.0.0.1:1").model()


def test_an_answer_that_breaks_off() -> None:
    events = b'data: {"choices": [{"text": "half"}]}\n\n'
    model = b'{"data": [{"id": "m", "max_new_tokens": 5, "has_chat_template": false}]}'
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for body in (model, events):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # closing on unread bytes would be a reset
                        pass

        threading.Thread(target=answer, daemon=True).start()
        client = ChatClient(f"http://127.0.0.1:{listening.getsockname()[1]}")
        stream = client.stream(ASK, **HOW)
        assert next(stream) == "half"
        with pytest.raises(ApiDownError, match="ended the answer early"):
            next(stream)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "9000", "--flask_port", "9000"], "port and flask_port are both 9000"),
        (["--port", "70000"], "the maximum is 65535"),
        (["--max_queue", "-1"], "the minimum is 0"),
        (["--max_queue", "5000"], "the maximum is 4096"),
        (["--src_len", "5"], "did you mean 'src_length'"),
    ],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load((ServerArguments,), flags, prog="server.py")


def test_a_host_that_is_not_this_machine() -> None:
    app = create_app(EngineWorker(make_served, 1), ApiSettings(Limits(1, 1)))
    with pytest.raises(UserError, match=r"cannot listen on 203\.0\.113\.1, flask_port=0"):
        HttpServer(app, host="203.0.113.1", port=0, max_requests=1, max_body_bytes=1024)
