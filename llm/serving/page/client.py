"""A small client of the API for the chat page: requests and server-sent events, nothing else."""

import json
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from llm.serving.listening import mounts

_CONNECT_SECONDS = 5
_READ_SECONDS = 300  # between two chunks; the first one may wait in the server's line
_GAUGE = re.compile(r"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)

Headers = Mapping[str, str]


@dataclass(eq=False)
class ApiError(Exception):
    """The API does not answer, or answers with an error.

    Args:
        message: for the user.
        code: the API's, or `gone` and `broke_off`, which the page words itself.
        status: of the response; 0 where there is none.
        param: field at fault, where the API names one.
    """

    message: str
    code: str
    status: int = 0
    param: str | None = None


def _known(certificate: str) -> ssl.SSLContext:
    """Take one certificate, under whatever name: who has its key is whom we look for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificate)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # though another has signed it
    return context


class ApiClient:
    """Talks to one API.

    Args:
        api_url: such as ``http://127.0.0.1:8011``.
        certificate: file of the API's own, where its name is not the one that it is reached by.
    """

    def __init__(self, api_url: str, certificate: str | None = None) -> None:
        self._certificate = certificate
        self._known = None if certificate is None else _known(certificate)
        self._http = httpx.AsyncClient(
            base_url=api_url.rstrip("/"),
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
            # A server that stops waits for open connections.
            limits=httpx.Limits(max_keepalive_connections=0),
            mounts=mounts(),
            verify=True if self._known is None else self._known,
        )
        self._url = api_url

    def reload(self) -> None:
        """Take the API's certificate as its file has it now, too."""
        if self._known is not None:
            self._known.load_verify_locations(self._certificate)

    async def status(self, headers: Headers) -> dict[str, Any]:
        """Return `state` (``ok``, ``loading``, ``stopping``, ``gone`` or ``key``), the models, and
        how many requests run and wait, where the API says so.

        Args:
            headers: with the user's key, if there is one.
        """
        try:
            health = await self._http.get("/health", timeout=_CONNECT_SECONDS)
            if health.status_code != 200:
                return {"state": _get(health, "status") or "gone", "models": []}
            async with self._sent("GET", "/v1/models", headers) as response:
                models = json.loads(await response.aread())["data"]
            gauges = _GAUGE.findall((await self._http.get("/metrics")).text)
        except (httpx.HTTPError, ValueError, LookupError, TypeError):  # or something else answers
            return {"state": "gone", "models": [], "url": self._url}
        except ApiError as error:
            state = "key" if error.status == 401 else "gone"
            return {"state": state, "models": [], "url": self._url}
        counts = {name: sum(float(v) for n, v in gauges if n == name) for name, _ in gauges}
        return {"state": "ok", "models": models, **counts}

    @asynccontextmanager
    async def stream(
        self, path: str, body: dict[str, Any], headers: Headers
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Ask for an answer and hand out its chunks; leaving closes the connection, which stops
        the server.

        Raises:
            ApiError: no answer, or an error instead of one.
        """
        try:
            content = json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a pair of surrogates, which browsers let one type
            content = json.dumps(body).encode()
        async with self._sent("POST", path, headers, content=content) as response:
            yield _chunks(response)

    @asynccontextmanager
    async def _sent(
        self, method: str, path: str, headers: Headers, **options: Any
    ) -> AsyncIterator[httpx.Response]:
        sent = httpx.Headers(headers)
        sent["Content-Type"] = "application/json"
        try:
            async with self._http.stream(method, path, headers=sent, **options) as response:
                if not response.is_success:
                    await response.aread()
                    raise _error(response)
                yield response
        except httpx.ConnectError as error:
            raise ApiError(f"The API at {self._url} does not answer.", "gone") from error
        except httpx.HTTPError as error:
            raise ApiError(
                f"The connection to {self._url} broke ({type(error).__name__}).", "broke_off"
            ) from error


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event."""
    rest = b""
    async for piece in response.aiter_bytes():
        # By bytes: as text a line would also end at U+2028 inside an answer.
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.strip() == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise _as_error(chunk["error"], 500)
                yield chunk
    raise ApiError("The server ended the answer early.", "broke_off")


def _get(response: httpx.Response, name: str) -> Any:
    try:
        return response.json().get(name)
    except (ValueError, AttributeError):
        return None


def _error(response: httpx.Response) -> ApiError:
    error = _get(response, "error")
    if isinstance(error, dict):
        return _as_error(error, response.status_code)
    status = response.status_code
    return ApiError(f"The API answered with status {status}: {response.text[:200]}", "", status)


def _as_error(error: dict[str, Any], status: int) -> ApiError:
    return ApiError(
        str(error.get("message")), str(error.get("code") or ""), status, error.get("param")
    )
