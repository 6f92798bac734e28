"""Why a request is not answered, in the form that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any, Final

SERVER_FAULT: Final = 500
"""From this status on it is not the client's fault."""


class Refusal(Exception):
    """A request that cannot be answered as it is, or not any more.

    Args:
        message: what is wrong, and what to do.
        param: the field that it is about.
        code: what programs go by, such as ``model_not_found``.
        status: of HTTP.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        self._param = param
        self._code = code

    def body(self) -> dict[str, Any]:
        """The content of the answer."""
        kind = "invalid_request_error" if self.status < SERVER_FAULT else "server_error"
        return error_body(str(self), kind, self._param, self._code)


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it; half of a surrogate pair in it is escaped."""
    message, named = _sendable(message), None if param is None else _sendable(param)
    return {"error": {"message": message, "type": kind, "param": named, "code": code}}


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
