"""OpenAI error bodies, and which status each kind of mistake gets."""

from __future__ import annotations

import logging
import math

import msgspec
from pydantic import ValidationError

from engine.errors import EngineDeadError, OverloadedError, RequestError

logger = logging.getLogger(__name__)

_MAX_MESSAGE = 1000


class ApiError(Exception):
    """An answer other than 200, as the official clients expect it.

    Attributes:
        status: HTTP status.
        type: OpenAI's class of error; by default ``"invalid_request_error"`` or ``"server_error"``.
        param: the request field at fault, or ``None``.
        code: OpenAI's machine-readable code, or ``None``.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:_MAX_MESSAGE]
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON error body, UTF-8."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        # A message may quote a lone surrogate, which has no UTF-8 form.
        error["message"] = self.message.encode("utf-8", "backslashreplace").decode("utf-8")
        return msgspec.json.encode({"error": error})


def from_exception(error: Exception) -> ApiError:
    """Translate what a handler raised; anything unforeseen is logged and becomes a 500 without its details."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.field, code=error.code)
        case OverloadedError():
            headers = retry_headers(error.retry_after_s)
            return ApiError(429, str(error), type="requests", code="rate_limit_exceeded", headers=headers)
        case EngineDeadError():
            headers = {} if error.retry_after_s is None else retry_headers(error.retry_after_s)
            return ApiError(503, str(error), code="engine_unavailable", headers=headers)
        case _:
            logger.error("A request failed unexpectedly", exc_info=error)
            return ApiError(500, "The server failed on this request; its log has the details.", code="internal_error")


def retry_headers(seconds: float) -> dict[str, str]:
    """When to come back: in whole seconds for everybody, in milliseconds for the official clients, which read both."""
    return {"retry-after": str(max(math.ceil(seconds), 1)), "retry-after-ms": str(max(math.ceil(seconds * 1000), 1))}


def from_validation(error: ValidationError) -> ApiError:
    """Turn the first of pydantic's complaints into a 400 that names the field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(
            400,
            f"The request body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}",
            code="invalid_json",
        )
    if not first["loc"]:
        return ApiError(400, f"The request body must be a JSON object: {first['msg']}")
    param = _field_path(first["loc"])
    return ApiError(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param)


def _field_path(location: tuple[int | str, ...]) -> str:
    """OpenAI's spelling of the field at fault: ``messages[0].role``; elsewhere the top-level name says enough.

    Pydantic mixes the names of union members into its locations, which mean nothing to a client.
    """
    path = str(location[0])
    if path == "messages" and len(location) > 1:
        path += f"[{location[1]}]"
        if len(location) > 2:
            path += f".{location[2]}"
    return path
