"""A small client of the API for the chat page: requests and server-sent events, nothing else."""

import json
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import requests

_CONNECT_SECONDS = 5
_READ_SECONDS = 300  # between two chunks; the first one may wait in the server's line

# A page redraws the whole answer for each piece of it: a browser keeps up with ten redraws a
# second of a long answer, not with one for every token.
_UPDATE_SECONDS = 0.1


class ApiDownError(Exception):
    """The API does not answer, or answers with an error; the message is for the user."""


@dataclass(frozen=True)
class ModelInfo:
    """What the API says about its model."""

    id: str
    max_new_tokens: int
    has_chat_template: bool


class ChatClient:
    """Talks to one API.

    Args:
        api_url: such as ``http://127.0.0.1:8011``.
        api_key: sent as a bearer token.
    """

    def __init__(self, api_url: str, api_key: str | None = None) -> None:
        self._url = api_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def model(self) -> ModelInfo:
        """Ask what is served.

        Raises:
            ApiDownError: no answer, or the model is still loading.
        """
        with self._request("GET", "/v1/models") as response:
            (model,) = response.json()["data"]
        return ModelInfo(model["id"], model["max_new_tokens"], model["has_chat_template"])

    def stream(
        self,
        messages: Sequence[dict[str, str]],
        *,
        temperature: float,
        max_tokens: int,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Yield the answer to a conversation as it comes, in pieces of a tenth of a second.

        Setting ``stop`` ends the iterator at once, also before the first word; the connection is
        closed with the next chunk, which stops the server. A model without a chat template was not
        trained on conversations: it continues the last message.

        Raises:
            ApiDownError: no answer, or an error instead of one.
        """
        stop = stop or threading.Event()
        finished = threading.Event()
        results: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()

        def read() -> None:
            try:
                with closing(self._deltas(messages, temperature, max_tokens)) as deltas:
                    for delta in deltas:
                        if stop.is_set() or finished.is_set():
                            return
                        results.put(delta)
            except Exception as error:  # noqa: BLE001 - raised again by the reader below
                results.put(error)
            finally:
                results.put(None)

        threading.Thread(target=read, name="answer", daemon=True).start()
        try:
            while not stop.wait(_UPDATE_SECONDS):
                items = []
                while not results.empty():
                    items.append(results.get())
                text = "".join(item for item in items if isinstance(item, str))
                if text:
                    yield text
                for item in items:
                    if isinstance(item, Exception):
                        raise item
                if None in items:
                    return
        finally:
            finished.set()

    def _deltas(
        self, messages: Sequence[dict[str, str]], temperature: float, max_tokens: int
    ) -> Iterator[str]:
        body: dict[str, Any] = {
            "stream": True,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if self.model().has_chat_template:
            path, body["messages"] = "/v1/chat/completions", list(messages)
        else:
            path, body["prompt"] = "/v1/completions", messages[-1]["content"]
        with self._request("POST", path, json=body, stream=True) as response:
            for event in _events(response):
                if "error" in event:
                    raise ApiDownError(event["error"]["message"])
                for choice in event["choices"]:
                    text = choice.get("text") or choice.get("delta", {}).get("content")
                    if text:
                        yield text

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            response = requests.request(
                method,
                self._url + path,
                headers=self._headers,
                timeout=(_CONNECT_SECONDS, _READ_SECONDS),
                **options,
            )
        except requests.RequestException as error:
            raise ApiDownError(
                f"The API at {self._url} does not answer ({type(error).__name__}). Is the server "
                "running?"
            ) from error
        if response.ok:
            return response
        with response:
            raise ApiDownError(_error_message(response))


def _events(response: requests.Response) -> Iterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event."""
    try:
        # Bytes: str.splitlines() would also cut at U+2028 inside an answer.
        for line in response.iter_lines(chunk_size=None):
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))
    except requests.RequestException as error:
        raise ApiDownError(f"The connection broke in the middle of the answer: {error}") from error
    raise ApiDownError("The server ended the answer early.")


def _error_message(response: requests.Response) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"The API answered with status {response.status_code}: {response.text[:200]}"
