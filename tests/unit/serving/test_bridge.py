"""WSGI applications behind uvicorn: what they are told, clients that are slow, what breaks."""

import contextlib
import errno
import http.client
import io
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import wsgiref.validate
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm.serving import wsgi
from llm.serving.bridge import GONE
from llm.serving.listening import listen
from llm.serving.wsgi import HttpServer, Site

Serve = Callable[..., list[int]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    started = []

    def start(
        *apps: Any, max_body_bytes: int = 1000, tls: ssl.SSLContext | None = None
    ) -> list[int]:
        sites = [Site(app, listen("127.0.0.1", 0, "flask_port"), tls) for app in apps]
        server = HttpServer(sites, max_requests=4, max_body_bytes=max_body_bytes)
        server.start()
        started.append(server)
        return [site.port for site in sites]

    yield start
    for server in started:
        server.stop()


def ask(port: int, method: str, path: str, **options: Any) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, **options)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def test_the_standard_s_own_checker_finds_nothing(serve: Serve) -> None:
    """wsgiref.validate looks at both sides of PEP 3333."""
    seen: list[dict[str, Any]] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        seen.append(environ)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        return iter([b"<", body, b">"])

    (port,) = serve(wsgiref.validate.validator(app))
    headers = {"X-Two": "1", "X_Two": "2", "Content-Type": "text/x"}
    path = "/a%20b/%C3%A9?q=%20"
    assert ask(port, "POST", path, body=b"hello", headers=headers) == (200, b"<hello>")
    environ = seen[0]
    assert environ["PATH_INFO"].encode("latin-1").decode() == "/a b/é"
    assert (environ["QUERY_STRING"], environ["CONTENT_TYPE"]) == ("q=%20", "text/x")
    assert environ["HTTP_X_TWO"] == "1", "a name with _ would pass for one with -"
    assert ask(port, "GET", "/") == (200, b"<>")


def test_sites_have_ports_of_their_own(serve: Serve) -> None:
    def named(name: bytes) -> Any:
        def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
            start_response("200 OK", [("Content-Length", str(len(name)))])
            return [name]

        return app

    one, other = serve(named(b"api"), named(b"management"))
    assert (ask(one, "GET", "/")[1], ask(other, "GET", "/")[1]) == (b"api", b"management")


def test_an_application_waits_for_a_slow_client_and_ends_when_it_leaves(serve: Serve) -> None:
    count, ended = [0], threading.Event()

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])

        def chunks() -> Iterator[bytes]:
            try:
                while not environ[GONE]():
                    count[0] += 1
                    yield b"x" * 65536
            finally:
                ended.set()

        return chunks()

    (port,) = serve(app)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        before = -1
        while before != count[0]:
            before = count[0]
            time.sleep(0.2)
        assert before * 65536 < 32 << 20, "it does not fill the memory"
        assert not ended.is_set()
    assert ended.wait(5)


def test_an_application_that_breaks(serve: Serve) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        raise RuntimeError("planted")

    (port,) = serve(app)
    status, body = ask(port, "GET", "/")
    assert status == 500 and json.loads(body)["error"]["type"] == "server_error"


def test_a_server_that_stops_tells_whoever_is_still_sending(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a body, and a client that does not read: an answer or an end, and no traceback."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        return iter(lambda: bytes(1 << 20), b"")

    monkeypatch.setattr(wsgi, "_STOP_S", 1.0)
    site = Site(app, listen("127.0.0.1", 0, "flask_port"))
    server = HttpServer([site], max_requests=4, max_body_bytes=1000)
    server.start()
    with (
        socket.create_connection(("127.0.0.1", site.port), timeout=20) as half,
        socket.create_connection(("127.0.0.1", site.port), timeout=20) as deaf,
    ):
        half.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert deaf.recv(12).startswith(b"HTTP/1.1 200")
        server.stop()
        assert half.recv(12) == b"HTTP/1.1 503"
    assert not [one for one in caplog.records if one.exc_info]


def test_heads_that_do_not_come_are_not_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether nothing comes, half a head, or half a second one, byte by byte."""
    monkeypatch.setattr(wsgi, "_HEAD_S", 0.5)

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        time.sleep(0.6 * (environ["PATH_INFO"] == "/slow"))
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    (port,) = serve(app)

    def said(first: bytes, drops: bytes = b"") -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
            one.sendall(first)
            heard = b"" if not first.endswith(b"\r\n\r\n") else one.recv(4096)
            begin = time.monotonic()
            for number in range(100):
                one.settimeout(0.05)
                try:
                    piece = one.recv(4096)
                except TimeoutError:
                    one.sendall(drops[number : number + 1])
                    continue
                if not piece:
                    break
                heard += piece
            assert 0.2 < time.monotonic() - begin < 3
            return heard

    ask_for = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"
    assert said(b"") == b""
    late = said(b"GET / HTT", drops=b"P/1.1\r\nX: " + b"y" * 90)
    assert late.startswith(b"HTTP/1.1 408 ") and b"within a minute" in late
    second = said(ask_for % b"/", drops=b"GET / " + b"y" * 90)
    assert second.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in second
    kept, opened = http.client.HTTPConnection("127.0.0.1", port, timeout=5), None
    for path in ("/slow", "/"):  # neither an answer nor the pause behind it is a head
        kept.request("GET", path)
        assert kept.getresponse().read() == b"ok"
        opened = opened or kept.sock
        assert kept.sock is opened, "the same connection"
        time.sleep(0.6)
    kept.close()


def test_of_a_body_that_is_too_long_the_length_is_told(serve: Serve) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        told = environ["CONTENT_LENGTH"], environ["wsgi.input"].read()
        start_response("413 Too Large", [("Content-Type", "text/plain")])
        return [repr(told).encode()]

    (port,) = serve(app)
    assert ask(port, "POST", "/", body=b"x" * 1001) == (413, b"('1001', b'')")
    chunked = {"body": io.BytesIO(b"x" * 5000), "encode_chunked": True}
    status, _ = ask(port, "POST", "/", headers={"Transfer-Encoding": "chunked"}, **chunked)
    assert status == 413


def certified(here: Path) -> ssl.SSLContext:
    """A server's context; whoever asks for it looks at nothing."""
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-subj", "/CN=x", "-keyout", str(here / "key"), "-out", str(here / "pem")]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(here / "pem", here / "key")
    return context


@pytest.mark.parametrize("secure", [False, True])
def test_answers_that_nobody_takes_are_not_kept(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, secure: bool
) -> None:
    """As many clients as there are threads read nothing; the next one is answered all the same."""
    if secure and shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    monkeypatch.setattr(wsgi, "_READING_S", 0.2)
    trusting = ssl._create_unverified_context()

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        if environ["PATH_INFO"] == "/short":
            return iter([b"ok"])
        return iter(lambda: bytes(65536), b"")

    (port,) = serve(app, tls=certified(tmp_path) if secure else None)
    head = b"POST /%s HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
    with contextlib.ExitStack() as stack:

        def connected(path: bytes) -> socket.socket:
            client = socket.create_connection(("127.0.0.1", port), timeout=5)
            client = trusting.wrap_socket(client) if secure else client
            stack.enter_context(client)
            client.sendall(head % path)
            return client

        reader, deaf, *_ = [connected(b"long") for _ in range(9)]
        end = time.monotonic() + 2
        while time.monotonic() < end:  # slow, but it reads
            assert reader.recv(1 << 15)
            time.sleep(0.005)
        assert connected(b"short").recv(99).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(ConnectionError):
            while deaf.recv(1 << 20):
                pass


def test_of_two_lengths_none_is_taken(serve: Serve) -> None:
    """A proxy may take the one and this server the other: what follows would be another request."""
    asked = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        asked.append(environ["PATH_INFO"])
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    (port,) = serve(app)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
        one.sendall(head + b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
        said = b"".join(iter(lambda: one.recv(4096), b""))
    assert said.startswith(b"HTTP/1.1 400 ") and b"send one" in said
    assert said.count(b"HTTP/1.1 ") == 1 and asked == []


def test_a_whole_address_is_a_path(serve: Serve) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}".encode("latin-1")]

    (port,) = serve(app)
    for asked, path in (
        ("http://a:80/v1/x?q=1", b"/v1/x?q=1"),
        ("HTTPS://a", b"/?"),
        ("/http://a/b", b"/http://a/b?"),
    ):
        assert ask(port, "GET", asked) == (200, path)


@pytest.mark.parametrize(
    ("head", "status", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"400", b"Host"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400", b"request line"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 99_000, b"431", b"longer than 65536 bytes"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", b"400", b"chunked"),
    ],
)
def test_why_something_is_no_request(serve: Serve, head: bytes, status: bytes, why: bytes) -> None:
    (port,) = serve(lambda environ, start_response: [])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
        one.sendall(head)
        said = b"".join(iter(lambda: one.recv(4096), b""))
    assert said.startswith(b"HTTP/1.1 " + status) and why in said


def test_files_that_run_out_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio would write a stack for each of some thousand tries a second."""

    class Short(socket.socket):
        tries = 0

        def accept(self) -> Any:
            Short.tries += 1
            if Short.tries <= 2000:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    site = Site(app, Short(fileno=listen("127.0.0.1", 0, "flask_port").detach()))
    server = HttpServer([site], max_requests=4, max_body_bytes=1000)
    server.start()
    assert ask(site.port, "GET", "/") == (200, b"ok"), "when there are some again"
    server.stop()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "no more connections are taken until others end" in said[0]
    assert Short.tries > 2000
