"""Requests of a batch to a server over HTTP, sent again where it turns them away for now."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from common.errors import UserError
from llm.serving.batch_files import Reply
from llm.serving.listening import mounts

if TYPE_CHECKING:
    from httpx import AsyncClient, Response

# Statuses that say nothing about the request itself; what a server is not up to is final.
_FOR_NOW = {408, 429, 502, 503, 504}
_UNKNOWN_AUTHORITY = "CERTIFICATE_VERIFY_FAILED"  # it will be no other one at the next try
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


class GoneError(UserError):
    """Nothing answers at the server's address, or not any more."""


def asking_server(
    url: str, key: str | None, max_retries: int, timeout_s: float
) -> Callable[[], AbstractAsyncContextManager[Callable[[str, bytes], Awaitable[Reply]]]]:
    """Return what asks a server, over as many connections as there are requests on their way.

    Args:
        url: of the server, without a path.
        key: sent as a bearer token.
        max_retries: of a request that is turned away for now, or whose connection breaks.
        timeout_s: how long an answer may take.

    Raises:
        GoneError: in use: nothing answers, also after retries, or the key is refused.
    """
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}

    @asynccontextmanager
    async def opened() -> AsyncIterator[Callable[[str, bytes], Awaitable[Reply]]]:
        import httpx

        async with httpx.AsyncClient(
            headers=headers,
            timeout=None,  # of the whole, which _once keeps
            limits=httpx.Limits(),
            mounts=mounts(),
            follow_redirects=True,
        ) as client:
            server = _Server(client, url, max_retries, timeout_s)
            await server.check()
            yield server.ask

    return opened


class _Server:
    def __init__(self, client: "AsyncClient", url: str, max_retries: int, timeout_s: float) -> None:
        self._client, self._url, self._max_retries = client, url, max_retries
        self._timeout_s = timeout_s

    async def check(self) -> None:
        """Wait for a server that is loading; see that it takes the key."""
        reply = await self._persist("GET", "/v1/models", None)
        if reply.status in (401, 403):
            raise GoneError(
                f"{self._url} refuses the key (status {reply.status}); set the environment "
                "variable LLM_API_KEY"
            )

    async def ask(self, url: str, body: bytes) -> Reply:
        """Return what a request is answered with in the end."""
        return await self._persist("POST", url, body)

    async def _persist(self, method: str, url: str, body: bytes | None) -> Reply:
        import httpx

        wait = _FIRST_WAIT_S
        for attempt in range(self._max_retries + 1):
            last = attempt == self._max_retries
            asked: float | None = None
            try:
                reply = await self._once(method, url, body)
                if reply.status not in _FOR_NOW or reply.final or last:
                    return reply
                asked = reply.retry_after
            except TimeoutError:  # the same again would be, too
                slow = f"no answer within {self._timeout_s:g} s; raise --request_timeout_s"
                return Reply(None, None, {"code": "timeout", "message": slow})
            except httpx.InvalidURL as error:
                return Reply(None, None, {"code": "invalid_url", "message": f"{url!r}: {error}"})
            except httpx.HTTPError as error:
                if _UNKNOWN_AUTHORITY in str(error):
                    raise GoneError(
                        f"{self._url} has a certificate that nothing here vouches for ({error}); "
                        "if it is the right server, name the file of its authority in the "
                        "environment variable SSL_CERT_FILE"
                    ) from error
                if last:
                    why = str(error) or type(error).__name__
                    raise GoneError(
                        f"nothing answers at {self._url} ({why}) after {attempt + 1} tries; see "
                        "that the server runs and --api_url is right, then run the same command "
                        "again"
                    ) from error
            await asyncio.sleep(min(wait if asked is None else asked, _LONGEST_WAIT_S))
            wait *= 2
        raise AssertionError("the last try returns or raises")

    async def _once(self, method: str, url: str, body: bytes | None) -> Reply:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        async with asyncio.timeout(self._timeout_s):
            answer = await self._client.request(
                method, self._url + url, content=body, headers=headers
            )
        return _reply(answer)


def _reply(answer: "Response") -> Reply:
    retry_after: float | None = None
    with contextlib.suppress(ValueError):  # a date: rare, and the wait of our own will do
        retry_after = float(answer.headers.get("Retry-After", ""))
    body: object = answer.text
    with contextlib.suppress(ValueError):
        body = json.loads(answer.text)
    # Of requests that alone are more than a key may ask for; OpenAI's clients obey it, too.
    final = answer.headers.get("x-should-retry") == "false"
    return Reply(answer.status_code, answer.headers.get("X-Request-Id"), body, retry_after, final)
