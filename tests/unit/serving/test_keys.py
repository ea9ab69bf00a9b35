"""Keys from a file: who is let in, what a wrong file says, and that nothing shows a key."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
from fakes import MakeClient

from common.errors import DataError
from llm.serving.keys import Keys

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
HASHED = hashlib.sha256(BOB.encode()).hexdigest()
YAML = f"""
- name: alice
  key: {ALICE}
  requests_per_minute: 2
- name: bob
  sha256: {HASHED}
  tokens_per_minute: 60
- {{name: digits, key: 0123456789}}
"""
LINES = "\n".join(
    json.dumps(entry)
    for entry in (
        {"name": "alice", "key": ALICE, "requests_per_minute": 2},
        {"name": "bob", "sha256": HASHED.upper(), "tokens_per_minute": 60},
        {"name": "digits", "key": "0123456789"},
    )
)
PROMPT = {"prompt": "hi", "max_tokens": 2}


def written(directory: Path, text: str, name: str = "keys.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("name", "text"), [("keys.yaml", YAML), ("keys.jsonl", LINES)])
def test_every_form_of_a_file(tmp_path: Path, name: str, text: str) -> None:
    keys = Keys(written(tmp_path, text, name), single="the-one-key")
    assert keys.wanted
    found = [keys.find(key) for key in (ALICE, BOB, "0123456789", "the-one-key")]
    assert [key and key.name for key in found] == ["alice", "bob", "digits", None]
    for wrong in ("", "sk-alice", ALICE + "x", HASHED, "é" * 20):
        assert keys.find(wrong) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys.yaml: has to be a list"),
        ("[]", "has no key; give each a line"),
        ("alice: secret-key-1", "has to be a list"),
        ("- secret-key-1", "entry 1: an entry has to have the fields name, key"),
        ("- {key: secret-key-1}", "entry 1: name=None has to be 1 to 64 letters"),
        ("- {name: a, kee: secret-key-1}", "entry 1: unknown field 'kee'; did you mean 'key'"),
        ("- {name: a b, key: secret-key-1}", "name='a b' has to be"),
        ("- {name: a}", "'a' needs key or sha256, one of the two"),
        (f"- {{name: a, key: secret-key-1, sha256: {HASHED}}}", "one of the two"),
        ("- {name: a, key: secret}", "key of 'a' has to be at least 8 ASCII characters"),
        ("- {name: a, key: secret-schlüssel}", "ASCII"),
        ("- {name: a, sha256: abc}", "sha256 of 'a' has to be 64 hexadecimal"),
        (
            "- {name: a, key: secret-key-1, requests_per_minute: 0}",
            "per_minute=0 has to be a whole",
        ),
        ("- {name: a, key: secret-key-1, tokens_per_minute: 1.5}", "per_minute='1.5' has to be"),
        ("- {name: a, key: secret-key-1}\n- {name: a, key: secret-key-2}", "entry 2: the name 'a'"),
        ("- {name: a, key: secret-key-1}\n- {name: b, key: secret-key-1}", "same key as 'a'"),
        (f"- {{name: a, key: {BOB}}}\n- {{name: b, sha256: {HASHED}}}", "same key as 'a'"),
        ("- {name: a, key: secret-key-1", "keys.yaml:1: is not valid YAML"),
        ("- {name: a, key: secret-key-1, key: secret-key-2}", "the key 'key' stands twice"),
        ("- name: a\n  key: 'secret-key-1\n", "is not valid YAML"),
    ],
)
def test_a_wrong_file_says_where_and_shows_no_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as wrong:
        Keys(written(tmp_path, text))
    assert message in str(wrong.value)
    for secret in ("secret-key", "secret", BOB, HASHED):
        assert secret not in str(wrong.value)


def test_a_single_key_that_is_in_the_file_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'alice' has the same key as --api_key"):
        Keys(written(tmp_path, YAML), single=ALICE)


def test_json_lines_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"keys\.jsonl:2: not JSON"):
        Keys(written(tmp_path, LINES.split("\n")[0] + "\n{bad", "keys.jsonl"))
    line = '{"name": "a", "key": "secret-key-1", "tokens_per_minute": true}'
    with pytest.raises(DataError, match=r"per_minute=True has to be a whole number"):
        Keys(written(tmp_path, line, "keys.jsonl"))
    with pytest.raises(DataError, match="nowhere"):
        Keys(tmp_path / "nowhere.jsonl")


def test_a_reload_takes_the_new_and_keeps_the_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, YAML)
    keys = Keys(path)
    before = keys.find(ALICE)
    assert before is not None
    before.rates.take_request()
    path.write_text(f"- {{name: alice, key: new-{ALICE}, requests_per_minute: 9}}")
    with caplog.at_level(logging.INFO):
        keys.reload()
    after = keys.find(f"new-{ALICE}")
    assert keys.find(ALICE) is None and keys.find(BOB) is None and after is not None
    assert after.rates.headers()["x-ratelimit-remaining-requests"] == "8"
    path.write_text("- {name: alice, key: short}")
    keys.reload()
    assert keys.find(f"new-{ALICE}") is after, "a wrong file changes nothing"
    assert "keys stay as they were" in caplog.text and ALICE not in caplog.text


def test_a_file_that_is_wrong_at_its_end_sets_no_limit(tmp_path: Path) -> None:
    path = written(tmp_path, YAML)
    keys = Keys(path)
    path.write_text(f"- {{name: alice, key: {ALICE}, requests_per_minute: 99}}\n- {{name: x}}")
    keys.reload()
    found = keys.find(ALICE)
    assert found and found.rates.headers()["x-ratelimit-limit-requests"] == "2"


def test_requests_of_a_key(tmp_path: Path, make_client: MakeClient) -> None:
    client = make_client(keys=Keys(written(tmp_path, YAML)))
    refused = client.post("/v1/completions", json=PROMPT)
    assert refused.status_code == 401 and "none came" in refused.get_json()["error"]["message"]
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    for left in (1, 0):
        good = client.post("/v1/completions", json=PROMPT, headers={"x-api-key": ALICE})
        assert good.status_code == 200
        assert good.headers["x-ratelimit-limit-requests"] == "2"
        assert good.headers["x-ratelimit-remaining-requests"] == str(left)
    full = client.post("/v1/completions", json=PROMPT, headers=bearer(ALICE))
    assert full.status_code == 429 and 1 <= int(full.headers["Retry-After"]) <= 60
    assert full.get_json()["error"]["type"] == "requests"
    assert full.headers["x-ratelimit-remaining-requests"] == "0"
    assert client.get("/v1/models", headers=bearer(ALICE)).status_code == 200, "asking is free"
    tgi = client.post("/generate", json={"inputs": "hi"}, headers=bearer(ALICE))
    assert tgi.status_code == 429 and tgi.get_json()["error_type"] == "overloaded"
    other = client.post("/v1/completions", json=PROMPT, headers=bearer(BOB))
    assert other.status_code == 200, "each key has limits of its own"


def test_tokens_of_a_key(tmp_path: Path, make_client: MakeClient) -> None:
    """The most that a request may come to is taken first, and what it came to counts."""
    client = make_client(keys=Keys(written(tmp_path, YAML)))
    asked = {"prompt": "hi", "max_tokens": 20}  # 3 tokens and at most 20; the answer has 3
    for left in (60 - 6, 60 - 12):
        answer = client.post("/v1/completions", json=asked, headers=bearer(BOB))
        usage = answer.get_json()["usage"]
        assert usage["total_tokens"] == 6
        answer.close()
        after = client.get("/v1/models", headers=bearer(BOB))
        assert after.headers["x-ratelimit-remaining-tokens"] == str(left)
    large = {"prompt": "hi", "max_tokens": 20, "n": 3}
    refused = client.post("/v1/completions", json=large, headers=bearer(BOB))
    assert refused.status_code == 429 and refused.headers["x-should-retry"] == "false"
    assert "may come to 63" in refused.get_json()["error"]["message"]
    most = {"prompt": "hi", "max_tokens": 23, "n": 2}  # 49, and 48 are left
    refused = client.post("/v1/completions", json=most, headers=bearer(BOB))
    assert refused.status_code == 429 and "Retry-After" in refused.headers
    assert refused.get_json()["error"]["type"] == "tokens"


def test_keys_take_turns_in_the_engine(tmp_path: Path, make_client: MakeClient) -> None:
    keyed = make_client(keys=Keys(written(tmp_path, YAML), single="the-one-key"))
    clients = []
    for key in (BOB, BOB, "the-one-key", "the-one-key"):
        keyed.post("/v1/completions", json=PROMPT, headers=bearer(key))
        clients.append(keyed.worker.served.engine.asked[-1].client)
    assert clients[0] == clients[1] == "key bob"
    assert len({*clients[2:], "key bob"}) == 3, "without names, each request has a turn"


def test_no_route_is_open_but_the_probes(tmp_path: Path, make_client: MakeClient) -> None:
    """Whatever families of routes there are, and in the error's shape of each."""
    client = make_client(keys=Keys(written(tmp_path, YAML)))
    asked = 0
    for rule in client.application.url_map.iter_rules():
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            response = client.open(rule.rule.replace("<path:model_id>", "x"), method=method)
            is_open = rule.rule in ("/health", "/metrics")
            assert response.status_code == (200 if is_open else 401), rule.rule
            asked += 1
    assert asked > 8
