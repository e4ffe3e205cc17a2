"""Errors as APIs tell them; each API has its own shape for them."""

from __future__ import annotations

from kimi_mlx.errors import EngineError, KimiMlxError, RingError, StepError, TextError, UsageError


class ApiError(KimiMlxError):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what is wrong, in words.
        code: the same for programs, such as `context_length_exceeded`; None if the status says it all.
        param: the place in the body, such as `messages.0.content`.
        retry_after_s: when to try again, if that is of use.
        allow: methods of HTTP that the path takes, if the request's is none of them.
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
    """What an error of any kind is to a client: the request's mistake, the ring's loss, or ours."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, KimiMlxError):
        return ApiError(500, "the server has made a mistake; its log has more", "internal_error")
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    if isinstance(error, UsageError | TextError | EngineError):
        return ApiError(400, message, "invalid_value")
    if isinstance(error, StepError):
        return ApiError(500, message, "step_failed")
    return ApiError(503, message, "ring_lost" if isinstance(error, RingError) else "unavailable")
