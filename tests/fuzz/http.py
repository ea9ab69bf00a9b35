"""Random and mutated requests and raw HTTP attacks on a real server.

No crash, no hang, no status of 500 or above for a client's fault, nothing in the log that nobody
caught; meanwhile right answers stay what they are, bit for bit, and memory stays.

    python -m tests.fuzz.http --seconds 600 --cases 10000
"""

import contextlib
import http.client
import json
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz import Tally, budget
from tests.fuzz.http_cases import Case, case_of, raw_of
from tests.served import Served, serving

_PATIENCE_S, _MOMENT_S = 20.0, 0.2
# Every so many cases the server is looked at, and is asked what it was asked at the start.
_LOOK = 100
_RAW_SHARE = 5  # every fifth case is raw
_GROWS_MIB = 60.0
# What a server says of protocols and methods that it does not have is no failure of its own.
_NOT_ITS_OWN = (501, 505)
_RIGHT = {"prompt": "Hello there", "max_tokens": 8, "temperature": 0, "seed": 1}


def _answer(served: Served) -> str:
    status, body = served.post("/v1/completions", _RIGHT)
    return json.dumps([status, body.get("choices")])


def _send(served: Served, case: Case) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=_PATIENCE_S)
    with contextlib.closing(connection):
        connection.putrequest(case.method, case.path, skip_accept_encoding=True)
        for name, value in case.headers.items():
            connection.putheader(name, value.encode("utf-8"))
        connection.putheader("Content-Length", str(len(case.body)))
        connection.endheaders(case.body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def try_request(served: Served, case: Case) -> str:
    """Return what came of a request, or what is wrong, which begins with "!"."""
    try:
        status, body = _send(served, case)
    except TimeoutError:
        return "! no answer"
    except (ConnectionError, http.client.HTTPException) as error:
        # A body that is too large, or a request line, may be refused by closing.
        return f"{case.kind}: closed" if len(case.body) > 1 << 20 else f"! {error!r}"
    if status >= 500 and status not in _NOT_ITS_OWN:
        return f"! {status}: {body[:300]!r}"
    if 400 <= status < 500 and case.method != "HEAD" and not body.strip():
        return f"! {status} without a word"
    return f"{case.kind}: {status // 100}xx"


def try_raw(served: Served, content: bytes, cut: bool, half: bool) -> str:
    """Return what came of raw bytes, or what is wrong, which begins with "!".

    With `half` this side is closed behind them; else the server may wait for more, as it should.
    """
    with socket.create_connection(("127.0.0.1", served.port), timeout=_PATIENCE_S) as one:
        said = b""
        try:
            one.sendall(content)
            if half:
                one.shutdown(socket.SHUT_WR)
            else:
                one.settimeout(_MOMENT_S)
            while piece := one.recv(65536):
                said += piece
        except TimeoutError:
            if half:
                return "! neither an answer nor the end of the connection"
        except OSError:
            pass  # it was closed meanwhile
    for line in said.split(b"\r\n"):
        if line.startswith(b"HTTP/1.") and line.split()[1].isdigit():
            status = int(line.split()[1])
            if status >= 500 and status not in _NOT_ITS_OWN:
                return f"! {line!r}"
    return f"raw{' cut' if cut else ''}: {'answered' if said else 'no answer'}"


def _look(served: Served, right: str) -> str | None:
    """Return what is wrong with the server, if anything."""
    if served.process.poll() is not None:
        return f"the server ended with {served.process.poll()}"
    if not served.healthy():
        return "not healthy"
    if (now := _answer(served)) != right:
        return f"another answer: {now} instead of {right}"
    return None


def main(argv: Sequence[str]) -> int:
    """Try requests within a budget."""
    plan, tally = budget(argv, __doc__ or ""), Tally("http")
    limits = ("--src_length", "200", "--max_length", "20", "--max_num_seqs", "8")
    with (
        tempfile.TemporaryDirectory(prefix="http-") as place,
        serving(Path(place), limits) as served,
    ):
        right, memory = _answer(served), 0.0
        number = 0
        for number, seed in enumerate(plan.seeds(), 1):
            what: Any = None
            if seed % _RAW_SHARE == 0:
                name, content, cut = raw_of(seed)
                what = try_raw(served, content, cut, seed // _RAW_SHARE % 2 == 0)
                shown = f"{name}{' (cut)' if cut else ''}"
            else:
                case = case_of(seed)
                what = try_request(served, case)
                shown = f"{case.method} {case.path[:60]} {case.headers} {case.body[:300]!r}"
            if number % _LOOK == 0 or what.startswith("!"):
                wrong = _look(served, right)
                what = f"! {wrong} after {what}" if wrong else what
                memory = memory or (served.resident() if number >= 10 * _LOOK else 0.0)
            if what.startswith("!"):
                tally.differ(seed, f"{what[2:]}; sent {shown}")
            else:
                tally.count(what)
            if served.process.poll() is not None:
                break
        _conclude(served, tally, number, memory)
    return tally.report()


def _conclude(served: Served, tally: Tally, number: int, memory: float) -> None:
    """Look at memory, at what still runs, at the log and at the end."""
    grown = served.resident() - memory if memory else 0.0
    if grown > _GROWS_MIB:
        tally.differ(number, f"memory grew by {grown:.0f} MiB from the {10 * _LOOK}th case on")
    counts = served.metrics()
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        if counts.get(name):
            tally.differ(number, f"{name} is {counts[name]:g} at the end")
    status, log = served.stop()
    if status:
        tally.differ(number, f"the server ended with status {status}")
    if "Traceback" in log:
        tally.differ(number, f"the log has {log[log.index('Traceback') :][:1500]}")
    print(f"http: {number} requests; memory grew by {grown:.1f} MiB from the {10 * _LOOK}th on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
