"""Errors of requests, independent of the format of each API."""

from __future__ import annotations

from kimi_mlx.errors import EngineError, KimiMlxError, RingError, StepError, TextError, UsageError


class ApiError(KimiMlxError):
    """An error response to a request.

    Args:
        status: HTTP status code.
        message: description, for people.
        code: error code, for programs, such as `context_length_exceeded`; None if the status is enough.
        param: location of the error in the body, such as `messages[0].content`.
        retry_after_s: seconds after which to retry, if a retry makes sense.
        allow: HTTP methods that the path accepts, if the request used another one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.allow = allow


def api_error(error: BaseException) -> ApiError:
    """Return the error response for any error: 4xx for errors of the client, 5xx for those of the server."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, KimiMlxError):
        return ApiError(500, "internal server error; see the server's log", "internal_error")
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    if isinstance(error, UsageError | TextError | EngineError):
        return ApiError(400, message, "invalid_value")
    if isinstance(error, StepError):
        return ApiError(500, message, "step_failed")
    return ApiError(503, message, "ring_lost" if isinstance(error, RingError) else "unavailable")
