"""Pages of other origins: preflights, what they may read, and origins that are not listed."""

import pytest
from fakes import MakeClient

from common.errors import UserError
from common.flags import load
from llm.config.serving import ServerArguments
from llm.serving.keys import Keys

PAGE = "https://chat.example.com"
ASKS = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}
ALLOWED = "Access-Control-Allow-Origin"


def test_a_page_that_is_listed(make_client: MakeClient) -> None:
    origins = ("http://localhost:3000", PAGE)
    client = make_client(cors_origins=origins, keys=Keys(single="the-one-key"))
    preflight = client.options("/v1/chat/completions", headers=ASKS)
    assert preflight.status_code == 200, "before a key can be sent"
    assert preflight.headers[ALLOWED] == PAGE and "Origin" in preflight.headers["Vary"]
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    asked = preflight.headers["Access-Control-Allow-Headers"]
    assert {word.strip() for word in asked.split(",")} == {"authorization", "content-type"}
    headers = {"Origin": PAGE, "Authorization": "Bearer the-one-key"}
    answer = client.post("/v1/completions", json={"prompt": "hi"}, headers=headers)
    assert answer.status_code == 200 and answer.headers[ALLOWED] == PAGE
    assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
    refused = client.post("/v1/completions", json={"prompt": "hi"}, headers={"Origin": PAGE})
    assert refused.status_code == 401 and refused.headers[ALLOWED] == PAGE, "it may read why"
    absent = client.get("/nowhere", headers=headers)
    assert absent.status_code == 404 and absent.headers[ALLOWED] == PAGE


@pytest.mark.parametrize(
    "origin", ["https://chat.example.com.evil.net", "http://chat.example.com", "null", "https://x"]
)
def test_a_page_that_is_not(make_client: MakeClient, origin: str) -> None:
    client = make_client(cors_origins=(PAGE,))
    assert (
        ALLOWED not in client.options("/v1/completions", headers={**ASKS, "Origin": origin}).headers
    )
    assert ALLOWED not in client.get("/v1/models", headers={"Origin": origin}).headers


def test_without_a_list_no_page_may(make_client: MakeClient) -> None:
    client = make_client(keys=Keys(single="the-one-key"))
    assert ALLOWED not in client.get("/health", headers={"Origin": PAGE}).headers
    assert client.options("/v1/completions", headers=ASKS).status_code == 401


def test_all_origins(make_client: MakeClient) -> None:
    client = make_client(cors_origins=("*",))
    assert client.get("/v1/models", headers={"Origin": "null"}).headers[ALLOWED] == "*"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chat.example.com", "'chat.example.com' has to be"),
        ("https://chat.example.com/", "without a path"),
        ("https://*.example.com", "has to be"),
        ("HTTPS://chat.example.com", "small letters"),
        ("https://chat.example.com:port", "has to be"),
        ("* https://chat.example.com", "give it alone"),
    ],
)
def test_origins_that_no_browser_sends(words: str, message: str) -> None:
    with pytest.raises(UserError, match="cors_origins.*" + message.replace("*", r"\*")):
        load((ServerArguments,), ["--cors_origins", *words.split()], prog="x")


def test_origins_that_browsers_send() -> None:
    words = ["https://a.b", "http://localhost:3000", "http://[::1]:80", "capacitor://localhost"]
    (arguments,) = load((ServerArguments,), ["--allowed-origins", *words], prog="x")
    assert arguments.cors_origins == words
