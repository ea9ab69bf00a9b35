"""The access log: what each line says, what none says, and files that are moved or full."""

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import MakeClient, make_served

from common.errors import DataError
from llm.serving.access_log import AccessLog
from llm.serving.keys import Keys

KEY = "sk-alice-0123456789"
HEADERS = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine-1"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: alice, key: {KEY}, tokens_per_minute: 100}}")
    return Keys(path)


def test_a_line_for_each_request(make_client: MakeClient, tmp_path: Path, keys: Keys) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path))
    client = make_client(make_served(delay=0.01), keys=keys, access_log=log)
    body = {"prompt": "hi", "n": 2, "max_tokens": 2}
    client.post("/v1/completions", json=body, headers=HEADERS).close()
    stream = client.post("/v1/completions", json={**body, "stream": True}, headers=HEADERS)
    assert len(lines(path)) == 1, "a line comes with the last byte"
    stream.get_data()
    stream.close()
    client.post("/v1/completions", json={**body, "max_tokens": 50}, headers=HEADERS).close()
    client.post("/v1/completions?x=secret", json=body, headers={"x-api-key": KEY + "x"}).close()
    client.get("/health").close()
    client.get("/metrics").close()
    first, second, third, fourth = lines(path)
    assert first.pop("time").endswith("+00:00")
    seconds = [first.pop(name) for name in ("queue_seconds", "first_token_seconds", "seconds")]
    assert seconds == sorted(seconds) and seconds[1] > 0.01
    assert first == {
        "request_id": "mine-1",
        "key": "alice",
        "model": "fake-llama",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "completion_tokens": 4,
        "finish_reasons": {"length": 2},
    }
    assert second["completion_tokens"] == 4 and second["status"] == 200
    assert (third["status"], third["error"]) == (429, "rate_limit_exceeded")
    assert (fourth["status"], fourth["error"]) == (401, "invalid_api_key")
    assert "key" not in fourth and "prompt_tokens" not in fourth
    text = path.read_text()
    assert KEY not in text and "secret" not in text and '"hi"' not in text
    assert path.stat().st_mode & 0o077 == 0, "its owner's alone"


def test_texts_where_they_are_wanted(make_client: MakeClient, tmp_path: Path) -> None:
    """``--log_texts``: what was asked, as it was sent, and each answer."""
    path = tmp_path / "access.log"
    client = make_client(access_log=AccessLog(str(path), texts=True))
    body = {"messages": [{"role": "user", "content": "schön"}], "n": 2, "stop": " wor"}
    client.post("/v1/chat/completions", json=body).close()
    asked = {"data": b'{"prompt": "\xff"}', "content_type": "application/json"}
    client.post("/v1/completions", **asked).close()
    first, second = lines(path)
    assert json.loads(first["request"]) == body
    assert first["answers"] == ["hello", "hello"]
    assert second["request"] == '{"prompt": "�"}' and second["status"] == 400


def test_an_error_within_a_stream(make_client: MakeClient, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    client = make_client(make_served(fail_at=1), access_log=AccessLog(str(path)))
    response = client.post("/v1/completions", json={"prompt": "hi", "stream": True})
    response.get_data()
    response.close()
    (line,) = lines(path)
    assert (line["status"], line["error"]) == (200, "engine_error")
    assert line["finish_reasons"] == {"error": 1}


def test_a_file_that_is_moved_away(tmp_path: Path) -> None:
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    path.write_text('{"old": 1}\n')
    log = AccessLog(str(path))
    log.write({"a": 1, "nothing": None})
    path.rename(moved)
    log.write({"a": 2})
    log.reopen()
    log.write({"a": 3})
    assert [line.get("a") for line in lines(moved)] == [None, 1, 2]
    assert [line["a"] for line in lines(path)] == [3]


def test_a_disk_that_is_full_stops_nobody(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(access_log=AccessLog("/dev/full"))
    for _ in range(3):
        response = client.post("/v1/completions", json={"prompt": "hi"})
        response.close()
        assert response.status_code == 200
    assert caplog.text.count("/dev/full cannot be written: [Errno 28]") == 1


def test_a_place_where_none_can_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/access\.log"):
        AccessLog(str(tmp_path / "nowhere" / "access.log"))


def test_what_clients_make_up_stays_on_its_line(
    make_client: MakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "access.log"
    client = make_client(access_log=AccessLog(str(path)))
    with caplog.at_level("INFO"):
        client.open("/no%0Awhere", method="FOO").close()
    (line,) = lines(path)
    assert (line["path"], line["method"]) == ("/no\\nwhere", "other")
    assert "/no\\nwhere 404" in caplog.text
    text = client.get("/metrics").get_data(as_text=True)
    assert 'handler="none",method="other",status="4xx"' in text
