"""Batch files in OpenAI's form: requests by line, and the answers to them.

A request is ``{"custom_id", "method": "POST", "url", "body"}``; an answer is ``{"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}``. The ``id`` is drawn from the request
and from what answers it, so that a later run knows whose answer it has before it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common import jsonl
from common.errors import DataError, Place, near_name
from common.results import NumberOf

_KEYS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class BatchRequest:
    """A request of a batch.

    Args:
        id: of its answer.
        custom_id: what the file calls it.
        url: a route, such as ``/v1/chat/completions``.
        body: of the request.
    """

    id: str
    custom_id: str
    url: str
    body: Mapping[str, Any]


class Reply(NamedTuple):
    """What came of a request.

    Args:
        status: of HTTP; None where there was no response.
        request_id: by which the server's log knows it, where it said so.
        body: JSON, or the text where it is none; where there was no response, why.
        retry_after: seconds after which the server would have it again, where it said so.
        final: the server said that the same again would be refused, too.
    """

    status: int | None
    request_id: str | None
    body: Any
    retry_after: float | None = None
    final: bool = False

    @property
    def fault(self) -> str:
        """What a request that failed is told: its error's message, in whatever family's shape."""
        error = self.body.get("error", self.body) if isinstance(self.body, dict) else self.body
        return str(error.get("message", error) if isinstance(error, dict) else error)


def read_requests(
    path: str | Path, check_url: Callable[[str], str | None], answering: object = None
) -> list[BatchRequest]:
    """The requests of a file, in order; all are looked at before any is answered.

    Args:
        path: of the file.
        check_url: says what is wrong with a route, if anything.
        answering: what else the answers depend on, as JSON: the model and its flags.

    Raises:
        DataError: by line, what is no request, or has the name of an earlier one.
    """
    found: list[BatchRequest] = []
    places: dict[str, Place] = {}
    for place, record in jsonl.read(path):
        request = _request(record, place, check_url, answering)
        first = places.setdefault(request.custom_id, place)
        if first is not place:
            raise DataError(
                f"custom_id {request.custom_id!r} is that of {first} too; answers are told apart "
                "by it, so give each request another",
                place,
            )
        found.append(request)
    if not found:
        raise DataError(f"{path} has no requests")
    return found


def _request(
    record: object, place: Place, check_url: Callable[[str], str | None], answering: object
) -> BatchRequest:
    if not isinstance(record, dict):
        raise DataError(f"a request is an object with {', '.join(_KEYS)}", place)
    for key in record:
        if key not in _KEYS:
            near = near_name(key, _KEYS)
            hint = f"did you mean {near!r}?" if near else f"a request has {', '.join(_KEYS)}"
            raise DataError(f"unknown key {key!r}; {hint}", place)
    if missing := [key for key in _KEYS if key not in record]:
        raise DataError(f"{missing[0]} is missing; a request has {', '.join(_KEYS)}", place)
    custom_id, method, url, body = (record[key] for key in _KEYS)
    if not isinstance(custom_id, str) or not custom_id:
        raise DataError(f"custom_id={custom_id!r:.40} has to be a text that is not empty", place)
    if method != "POST":
        raise DataError(f"method={method!r:.40}: batches take POST only", place)
    if not isinstance(url, str) or not url.startswith("/"):
        raise DataError(
            f"url={url!r:.60} has to be a route of the server, such as /v1/chat/completions", place
        )
    if (wrong := check_url(url)) is not None:
        raise DataError(f"url={url}: {wrong}", place)
    if not isinstance(body, dict):
        raise DataError(f"body={body!r:.40} has to be an object", place)
    if body.get("stream"):
        raise DataError("body.stream: answers of a batch are whole; leave it out", place)
    text = json.dumps([custom_id, url, body, answering], sort_keys=True)
    name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return BatchRequest(f"batch_req_{name}", custom_id, url, body)


def answer_row(request: BatchRequest, reply: Reply) -> dict[str, Any]:
    """Return the line of an answer, or of a request that failed."""
    row: dict[str, Any] = {"id": request.id, "custom_id": request.custom_id}
    if reply.status is None:
        return {**row, "response": None, "error": reply.body}
    response = {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body}
    return {**row, "response": response, "error": None}


def earlier_answers(requests: Sequence[BatchRequest]) -> NumberOf:
    """Return what tells the number of the request that an earlier line answers."""
    numbers = {request.custom_id: number for number, request in enumerate(requests)}

    def number_of(place: Place, row: object) -> int:
        custom_id = row.get("custom_id") if isinstance(row, dict) else None
        number = numbers.get(custom_id) if isinstance(custom_id, str) else None
        if number is None or not isinstance(row, dict) or row.get("id") != requests[number].id:
            raise DataError(
                f"is no answer to this batch's request {custom_id!r:.60} (its line, the model or "
                "the flags have changed, or the file is another batch's); remove the file to begin "
                "anew, or give another output_file",
                place,
            )
        return number

    return number_of
