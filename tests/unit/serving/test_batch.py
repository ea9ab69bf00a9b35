"""Batch files: what is refused by line, what answers them, and going on after an early end."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from fakes import MakeClient

from common.errors import DataError, UserError
from common.flags import load
from llm.config.batch import BatchArguments
from llm.config.scripts import SCRIPTS
from llm.serving import batch
from llm.serving.batch import Batch, _any_route, _check_places, _route_check, asking_app
from llm.serving.batch_client import GoneError, asking_server
from llm.serving.batch_files import Reply, read_requests

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}


def asked(custom_id: str = "a", url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body or CHAT}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: object) -> Path:
        path = tmp_path / "asked.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    return write


def arguments(tmp_path: Path, **more: Any) -> BatchArguments:
    return BatchArguments(str(tmp_path / "asked.jsonl"), str(tmp_path / "said.jsonl"), **more)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "asked.jsonl:2: not JSON"),
        ([1], "asked.jsonl:2: a request is an object with custom_id, method, url, body"),
        ({**asked("b"), "metod": "POST"}, "unknown key 'metod'; did you mean 'method'"),
        ({**asked("b"), "colour": 1}, "a request has custom_id, method, url, body"),
        ({k: v for k, v in asked("b").items() if k != "body"}, "2: body is missing"),
        (asked("a"), r"2: custom_id 'a' is that of .*asked.jsonl:1 too"),
        ({**asked("b"), "custom_id": 7}, "custom_id=7 has to be a text"),
        ({**asked("b"), "custom_id": ""}, "custom_id='' has to be a text"),
        ({**asked("b"), "method": "GET"}, "method='GET': batches take POST only"),
        ({**asked("b"), "url": "http://h/v1/completions"}, "has to be a route of the server"),
        ({**asked("b"), "url": "/v1/nothing"}, "no such route; .*/v1/chat/completions"),
        ({**asked("b"), "url": "/health"}, "no such route"),
        ({**asked("b"), "body": []}, r"body=\[\] has to be an object"),
        ({**asked("b"), "body": {**CHAT, "stream": True}}, "body.stream"),
        ('{"custom_id": "b", "custom_id": "c"}', "'custom_id' stands twice"),
    ],
)
def test_bad_lines_are_refused_by_line(
    line: object, says: str, write: Callable[..., Path], make_client: MakeClient
) -> None:
    check = _route_check(make_client().application)
    with pytest.raises(DataError, match=says):
        read_requests(write(asked(), line), check)


def test_an_empty_file_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="has no requests"):
        read_requests(write(), _any_route)


def answer_all(args: BatchArguments, app: Any) -> Batch:
    found = Batch(args, read_requests(args.input_file, _route_check(app)))
    found.run(lambda: asking_app(app, 3), 3)
    return found


def test_answers_are_those_of_the_routes_in_the_order_of_the_file(
    tmp_path: Path, write: Callable[..., Path], make_client: MakeClient
) -> None:
    client = make_client(max_queue=8)
    lines = [asked(str(n), max_tokens=n, **{k: CHAT[k] for k in ("messages",)}) for n in (3, 1, 2)]
    write(*lines, asked("t", "/v1/completions", prompt="hello"), asked("x", **CHAT, tmperature=1))
    args = arguments(tmp_path)
    found = answer_all(args, client.application)
    said = rows(tmp_path / "said.jsonl")
    assert [row["custom_id"] for row in said] == ["3", "1", "2", "t"]
    for line, row in zip(lines, said, strict=False):
        direct = client.post(line["url"], json=line["body"]).get_json()
        assert row["response"]["body"]["choices"] == direct["choices"]
        assert row["response"]["body"]["usage"] == direct["usage"]
        assert row["error"] is None and row["response"]["status_code"] == 200
        assert row["response"]["request_id"] and row["id"].startswith("batch_req_")
    assert said[3]["response"]["body"]["object"] == "text_completion"
    assert found.failed == 1
    (wrong,) = rows(tmp_path / "said.errors.jsonl")
    assert wrong["custom_id"] == "x" and wrong["response"]["status_code"] == 400
    assert "temperature" in wrong["response"]["body"]["error"]["message"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("asked.jsonl", "said.errors.jsonl", "said.jsonl")
    ]


class StopError(Exception):
    """Ends a run early."""


class Scripted:
    """Answers; counts what was asked; ends the run at a request."""

    def __init__(self, stop_at: str | None = None, status: int = 200) -> None:
        self.seen: list[str] = []
        self._stop_at, self._status = stop_at, status

    async def ask(self, url: str, body: bytes) -> Reply:
        name = json.loads(body)["name"]
        await asyncio.sleep(0)
        if name == self._stop_at:
            raise StopError
        self.seen.append(name)
        return Reply(self._status, f"id-{name}", {"answer": name})

    def asking(self) -> Any:
        import contextlib

        @contextlib.asynccontextmanager
        async def opened() -> Any:
            yield self.ask

        return opened


def scripted(tmp_path: Path, write: Callable[..., Path], *names: str) -> tuple[Any, Any]:
    write(*(asked(name, "/any", name=name) for name in names))
    args = arguments(tmp_path)
    return args, lambda: Batch(args, read_requests(args.input_file, _any_route))


def test_the_same_command_goes_on(
    tmp_path: Path, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"r{number}" for number in range(8)]
    args, made = scripted(tmp_path, write, *names)
    first = Scripted(stop_at="r5")
    with pytest.raises(StopError):
        made().run(first.asking, 2)
    assert not Path(args.output_file).exists()
    partial = tmp_path / "said.jsonl.partial"
    assert sorted(row["custom_id"] for row in rows(partial)) == sorted(first.seen)
    kept = f"{len(first.seen)} of 8 answers are in {partial}"
    assert f"stopped: {kept}; the same command goes on" in capsys.readouterr().err
    with partial.open("a") as file:
        file.write('{"id": "batch_req_')  # a kill has cut it
    second = Scripted()
    made().run(second.asking, 2)
    assert sorted([*first.seen, *second.seen]) == names, "none is asked twice"
    assert [row["custom_id"] for row in rows(Path(args.output_file))] == names
    assert not partial.exists() and not args.error_place.exists()
    third = Scripted()
    made().run(third.asking, 2)
    assert third.seen == [] and "8 of 8 requests are answered already" in capsys.readouterr().err


def test_what_failed_is_asked_again(tmp_path: Path, write: Callable[..., Path]) -> None:
    args, made = scripted(tmp_path, write, "a", "b")
    failed = made()
    failed.run(Scripted(status=500).asking, 1)
    assert failed.failed == 2 and len(rows(args.error_place)) == 2
    assert rows(Path(args.output_file)) == []
    again = made()
    again.run(Scripted().asking, 1)
    assert again.failed == 0 and not args.error_place.exists()
    assert [row["custom_id"] for row in rows(Path(args.output_file))] == ["a", "b"]


def test_answers_to_other_requests_are_not_gone_on_with(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    args, made = scripted(tmp_path, write, "a", "b")
    with pytest.raises(StopError):
        made().run(Scripted(stop_at="b").asking, 1)
    partial = (tmp_path / "said.jsonl.partial").read_text()
    write(asked("a", "/any", name="a", seed=1), asked("b", "/any", name="b"))
    with pytest.raises(DataError, match=r"said.jsonl.partial:1: is no answer to .* 'a'.*remove"):
        made().run(Scripted().asking, 1)
    assert (tmp_path / "said.jsonl.partial").read_text() == partial
    assert read_requests(args.input_file, _any_route)[0].id != (
        read_requests(args.input_file, _any_route, {"dtype": "bfloat16"})[0].id
    )


def test_two_runs_do_not_write_one_file(tmp_path: Path, write: Callable[..., Path]) -> None:
    _, made = scripted(tmp_path, write, "a")

    class Nested(Scripted):
        async def ask(self, url: str, body: bytes) -> Reply:
            with pytest.raises(DataError, match="is being written by another process"):
                await asyncio.to_thread(made().run, Scripted().asking, 1)
            return await super().ask(url, body)

    made().run(Nested().asking, 1)
    assert [row["custom_id"] for row in rows(tmp_path / "said.jsonl")] == ["a"]


@pytest.fixture
def server() -> Iterator[Any]:
    """A server that answers as its ``script`` says: (status, headers) for each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self.server.got.append((self.path, json.loads(self.rfile.read(length))))
            script = self.server.script
            self._say(*(script.pop(0) if script else (200, {})))

        def do_GET(self) -> None:
            self.server.keys.append(self.headers.get("Authorization"))
            self._say(self.server.models_status, {})

        def _say(self, status: int, headers: dict[str, str]) -> None:
            if status == 0:
                self.connection.close()
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("X-Request-Id", "r-1")
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b'{"ok": 12}')

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.script, http.got, http.keys, http.models_status = [], [], [], 200
    Thread(target=http.serve_forever, daemon=True).start()
    http.url = f"http://127.0.0.1:{http.server_port}"
    yield http
    http.shutdown()
    http.server_close()


def ask_one(
    url: str,
    key: str | None = None,
    retries: int = 2,
    seconds: float = 5.0,
    route: str = "/v1/completions",
) -> Reply:
    async def run() -> Reply:
        async with asking_server(url, key, retries, seconds)() as ask:
            return await ask(route, b'{"prompt": "x"}')

    return asyncio.run(run())


def test_a_server_is_asked_again_where_it_turns_away_for_now(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.serving.batch_client._FIRST_WAIT_S", 0.01)
    server.script = [(503, {"Retry-After": "0"}), (429, {})]
    assert ask_one(server.url, "secret") == Reply(200, "r-1", {"ok": 12})
    assert server.got == [("/v1/completions", {"prompt": "x"})] * 3
    assert server.keys == ["Bearer secret"]
    server.script = [(503, {})] * 3
    assert ask_one(server.url).status == 503, "the last answer is kept"
    server.script = [(500, {})]
    assert ask_one(server.url).status == 500, "it would fail again"
    server.script = [(429, {"x-should-retry": "false"})]
    assert ask_one(server.url).status == 429, "as it says itself"
    assert len(server.got) == 8
    server.script = [(0, {})]
    assert ask_one(server.url).status == 200, "a broken connection"


def test_a_server_that_is_not_there_or_refuses_the_key(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.serving.batch_client._FIRST_WAIT_S", 0.01)
    server.models_status = 401
    with pytest.raises(GoneError, match=r"refuses the key.*LLM_API_KEY"):
        ask_one(server.url)
    server.script = [(0, {})] * 9
    server.models_status = 200
    with pytest.raises(GoneError, match=r"nothing answers at .* after 3 tries"):
        ask_one(server.url)


def test_what_a_server_is_asked_with(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirects are followed, a proxy is for other hosts, and a bad route is one request's."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server.script = [(307, {"Location": "/v2/completions"})]
    assert ask_one(server.url, "schlüssel").status == 200
    assert [path for path, _ in server.got] == ["/v1/completions", "/v2/completions"]
    assert server.keys[0].encode("latin-1").decode() == "Bearer schlüssel"
    reply = ask_one(server.url, route="/v1/\x00")
    assert reply.status is None and reply.body["code"] == "invalid_url"
    monkeypatch.setattr(server.RequestHandlerClass, "_say", lambda *_: time.sleep(1))
    assert ask_one(server.url, seconds=0.1).body["code"] == "timeout"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"error": {"message": "too long", "type": "x"}}, "too long"),
        ({"error": "too long", "error_type": "validation"}, "too long"),
        ({"code": "timeout", "message": "no answer"}, "no answer"),
        ("<html>", "<html>"),
    ],
)
def test_the_fault_of_a_request_in_any_family_s_words(body: Any, fault: str) -> None:
    assert Reply(400, None, body).fault == fault


def flags(words: str) -> tuple[Any, ...]:
    return load(SCRIPTS["llm.serving.batch"], words.split(), prog="x")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--output_file o --api_url http://h", "input_file is needed|input_file"),
        ("--input_file i --output_file o", "nobody answers"),
        ("--input_file i --output_file o --api_url h:80", "no address of a server"),
        (
            "--input_file i --output_file o --api_url http://h --model_name_or_path m",
            "model_name_or_path would have no effect: the server at http://h",
        ),
        ("--input_file i --output_file i --api_url http://h", "both i"),
        ("--input_file i --output_file o --error_file o --api_url http://h", "both o"),
        ("--input_file i --output_file /dev/stdout --api_url http://h", "--error_file"),
    ],
)
def test_flags_are_refused_before_work(words: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        args, place = flags(words)
        batch.check_one_answers(args, place)
        _check_places(args)


def test_a_base_url_of_clients_is_an_address() -> None:
    args, _ = flags("--input_file i --output_file o --api_url http://h:80/v1/")
    assert args.api_url == "http://h:80"
