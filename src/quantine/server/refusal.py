"""Why a request is not answered, in the form that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that cannot be answered as it is.

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
        return error_body(str(self), "invalid_request_error", self._param, self._code)


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
