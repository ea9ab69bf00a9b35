"""Requests that are wrong, each made of its seed: fields, bytes, and what no client would send."""

import gzip
import json
import random
from dataclasses import dataclass
from typing import Any

_SAY = [{"role": "user", "content": "Say something."}]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
# Requests that are right, by route; cases change them.
RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": _SAY, "max_tokens": 2, "temperature": 0}),
    ("/v1/chat/completions", {"messages": _SAY, "max_tokens": 3, "n": 2, "seed": 1, "stop": ["a"]}),
    ("/v1/chat/completions", {"messages": _SAY, "max_tokens": 2, "tools": [_TOOL]}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 2, "top_p": 0.5, "logprobs": 1}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 1, "echo": True, "temperature": 0}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "best_of": 2, "stream": False}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 2, "store": False}),
    ("/v1/messages", {"messages": _SAY, "max_tokens": 2, "model": "default"}),
    ("/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 2, "details": True}}),
    ("/generate_stream", {"inputs": "Hello", "parameters": {"max_new_tokens": 2}}),
    ("/api/chat", {"context": "Hello", "max_length": 2}),
    ("/tokenize", {"prompt": "Hello"}),
    ("/detokenize", {"tokens": [5, 6]}),
]
# Values that fields do not expect, from the common to the absurd.
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 1e308, -1e308, 1e-320, 0.1, 2**31, 2**63, -(2**63), 10**40),
    *("", "x", "\x00", "\ud83d\ude00", "\ufeff", "é" * 50, "9" * 400, "null", "NaN"),
    *([], [[]], [None], [0] * 40, ["x"] * 70, {}, {"a": {}}, [{"role": "user"}]),
    *("[" * 20_000, '{"a": 1e400}', {"9" * 5000: 1}, {"5": 1, "05": 1}),
    {"type": "json_schema", "json_schema": {"schema": {"type": "number", "multipleOf": 999983}}},
    {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "wrong"}}},
    {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$ref": "#/$ref"}}},
    [{"type": "function", "function": {"name": "g", "parameters": {"type": 5}}}],
    [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
)
_FIELDS = (
    *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "temperature"),
    *("top_p", "top_k", "min_p", "n", "best_of", "stop", "seed", "logprobs", "top_logprobs"),
    *("logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "echo"),
    *("response_format", "tools", "tool_choice", "guided_json", "guided_regex", "guided_grammar"),
    *("structured_outputs", "stop_token_ids", "prompt_logprobs", "priority", "suffix", "user"),
    *("input", "instructions", "max_output_tokens", "system", "inputs", "parameters", "context"),
    *("history", "tokens", "chat_template_kwargs", "continue_final_message", "colour", "Model", ""),
)


@dataclass(frozen=True)
class Case:
    """A request as bytes.

    Args:
        kind: what was done to it.
        method: of HTTP.
        path: of the route, with a query perhaps.
        body: what is sent.
        headers: beside its length.
    """

    kind: str
    method: str
    path: str
    body: bytes
    headers: dict[str, str]


def _mutated(value: Any, draw: random.Random) -> Any:
    """Return a value of JSON in which one place is another."""
    if isinstance(value, dict) and value and draw.random() < 0.75:
        key = draw.choice(list(value))
        return {**value, key: _mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.75:
        at = draw.randrange(len(value))
        return [*value[:at], _mutated(value[at], draw), *value[at + 1 :]]
    if isinstance(value, str) and draw.random() < 0.3:
        return value + chr(draw.choice((0, 9, 127, 0x202E, 0x1F600, 0xFFFF, 0x10FFFF))) * 3
    return draw.choice(_ODD)


def _fields(body: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    changed = dict(body)
    for _ in range(draw.randint(1, 3)):
        changed[draw.choice(_FIELDS)] = draw.choice(_ODD)
    return changed


def _bytes(text: bytes, draw: random.Random) -> bytes:
    content = bytearray(text)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(content) + 1)
        action = draw.randrange(4)
        if action == 0:
            content[at:at] = draw.randbytes(draw.randint(1, 4))
        elif action == 1:
            del content[at : at + draw.randint(1, 9)]
        elif action == 2:
            content[at:at] = content[: draw.randint(1, 30)]
        elif at < len(content):
            content[at] = draw.randrange(256)
    return bytes(content)


def _deep(draw: random.Random) -> bytes:
    depth = draw.choice((50, 1000, 100_000))
    inner = draw.choice((b"[", b'{"a":'))
    return b'{"messages":' + inner * depth + draw.choice((b"", b"1" + b"]" * depth))


def case_of(seed: int) -> Case:
    """Return the request of a seed."""
    draw = random.Random(seed)
    path, body = draw.choice(RIGHT)
    method, head = "POST", {"Content-Type": "application/json"}
    kind = draw.choice(("field", "field", "value", "value", "bytes", "deep", "shape", "http"))
    if kind == "field":
        sent = json.dumps(_fields(body, draw)).encode()
    elif kind == "value":
        sent = json.dumps(_mutated(body, draw), ensure_ascii=draw.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
    elif kind == "bytes":
        sent = _bytes(json.dumps(body).encode(), draw)
    elif kind == "deep":
        sent = _deep(draw)
    elif kind == "shape":
        sent = json.dumps(draw.choice(_ODD)).encode()
    else:
        sent = json.dumps(body).encode()
        method = draw.choice(("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "POST"))
        path = draw.choice(
            (path, path + "/", path * 30, "/v1/../v1/models", "/%00", "//", path + "?a")
        )
        words = ("text/plain", "application/json; charset=latin-1", "", "multipart/form-data", "\t")
        head = {
            "Content-Type": draw.choice(words),
            "X-Request-Id": draw.choice(("", "é", "x" * 999)),
        }
        head["Authorization"] = draw.choice(("Bearer", "Bearer ü", "Basic AAAA", ""))
    return Case(kind, method, path, sent, head)


_LINE = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
_GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
_BODY = b'{"prompt": "Hello", "max_tokens": 2, "temperature": 0}'


def raw_of(seed: int) -> tuple[str, bytes, bool]:
    """Return the bytes of a connection by seed: what is wrong, all of it, and whether it is cut."""
    draw = random.Random(~seed)
    length = b"Content-Length: %d\r\n\r\n" % len(_BODY)
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    attacks = {
        "noise": draw.randbytes(draw.randint(1, 3000)),
        "no protocol": b"GET /health\r\n\r\n",
        "old protocol": b"GET /health HTTP/0.9\r\n\r\n",
        "new protocol": b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
        "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(200),
        "many headers": _LINE + b"".join(b"X-%d: y\r\n" % n for n in range(5000)) + length + _BODY,
        "long header": _LINE + b"X: " + b"y" * 300_000 + b"\r\n" + length + _BODY,
        "long path": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        "no colon": _LINE + b"Nothing\r\n" + length + _BODY,
        "nul in header": _LINE + b"X: \x00\r\n" + length + _BODY,
        "folded": _LINE + b"X: a\r\n b\r\n" + length + _BODY,
        "two lengths": _LINE + b"Content-Length: 5\r\n" + length + _BODY,
        "length and chunks": _LINE + b"Content-Length: 5\r\n" + chunked + b"0\r\n\r\n",
        "bad length": _LINE + b"Content-Length: -5\r\n\r\n" + _BODY,
        "word as length": _LINE + b"Content-Length: five\r\n\r\n" + _BODY,
        "huge length": _LINE + b"Content-Length: 99999999999999999999\r\n\r\n" + _BODY,
        "less than said": _LINE + b"Content-Length: 500\r\n\r\n" + _BODY,
        "no length": _LINE + b"\r\n",
        "bad chunk": _LINE + chunked + b"zz\r\n" + _BODY + b"\r\n0\r\n\r\n",
        "cut chunk": _LINE + chunked + b"ff\r\n" + _BODY,
        "negative chunk": _LINE + chunked + b"-1\r\n\r\n",
        "unknown coding": _LINE + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "good chunks": _LINE + chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(_BODY), _BODY),
        "expect": _LINE + b"Expect: 100-continue\r\n" + length + _BODY,
        "expect nonsense": _LINE + b"Expect: 7\r\n" + length + _BODY,
        "packed": _LINE + b"Content-Encoding: gzip\r\n" + length + gzip.compress(_BODY),
        "pipeline": (_LINE + length + _BODY) * 5,
        "upgrade": _GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        "absolute": b"GET http://b/health HTTP/1.1\r\nHost: a\r\n\r\n",
        "connect": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        "two hosts": _GET + b"Host: b\r\n\r\n",
        "bare lines": b"GET /health HTTP/1.1\nHost: a\n\n",
    }
    name = draw.choice(list(attacks))
    content = attacks[name]
    cut = draw.random() < 0.3
    return name, content[: draw.randint(1, len(content))] if cut else content, cut
