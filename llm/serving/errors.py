"""Errors of the HTTP API, in the body formats that OpenAI's and TGI's clients parse."""

from collections.abc import Mapping
from typing import Any

from common.errors import UserError


class ApiError(UserError):
    """A request that gets an error status.

    Args:
        message: names the value, the limit and the fix.
        status: HTTP status code.
        param: the request field at fault, where there is one.
        code: short machine-readable word.
        retry_after: seconds for the ``Retry-After`` header of statuses 429 and 503.
        kind: OpenAI's error ``type``, where the status does not say it.
        headers: others of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self._kind = kind
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's error ``type`` of this status."""
        if self._kind is not None:
            return self._kind
        if self.status == 401:
            return "authentication_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def openai_body(self) -> dict[str, Any]:
        """Return ``{"error": {...}}`` as OpenAI's API sends it."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def tgi_body(self) -> dict[str, Any]:
        """Return ``{"error": text, "error_type": word}`` as text-generation-inference sends it."""
        if self.status in (429, 503):
            word = "overloaded"
        else:
            word = "validation" if self.status < 500 else "generation"
        return {"error": self.message, "error_type": word}


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads what would be answered."""
