"""Errors of requests, independent of the format of each API."""

from __future__ import annotations

from typing import Any

from kimi_mlx.errors import EngineError, ImageError, KimiMlxError, RingError, StepError, TextError, UsageError

MAX_MESSAGE_CHARS = 1000
"""Maximum length of a message: it may quote a value of the request."""


class ApiError(KimiMlxError):
    """An error response to a request.

    Args:
        status: HTTP status code.
        message: description, for the client, with what the client can do about it.
        code: error code, for programs, such as `context_length_exceeded`; None if the status is enough.
        param: location of the error in the body, such as `messages[0].content`.
        retry_after_s: seconds after which to retry, if a retry makes sense.
        headers: additional headers of the response.
        hint: advice for the operator of the server, for the log; the client does not receive it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        hint: str | None = None,
    ):
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}..."
        super().__init__(message, hint)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers

    def __reduce__(self) -> tuple[type[ApiError], tuple[Any, ...]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep all fields when the error crosses a process boundary."""
        fields = (self.status, self.message, self.code, self.param, self.retry_after_s, self.headers, self.hint)
        return type(self), fields

    @property
    def log_text(self) -> str:
        """Message and hint, for the log."""
        return self.message if self.hint is None else f"{self.message} ({self.hint})"


class PromptTooLongError(ApiError):
    """A prompt that does not fit the context.

    Clients recognise it by the wording of its message rather than by its code, and then shorten the conversation. The
    message has OpenAI's wording; `anthropic_message` has Anthropic's.

    Args:
        num_tokens: number of tokens of the prompt.
        context_tokens: size of the context.
        param: location of the prompt in the body.
        is_exact: False if the prompt may have more tokens, because the rest was not counted.
    """

    def __init__(self, num_tokens: int, context_tokens: int, param: str, is_exact: bool = True):
        super().__init__(
            400,
            f"This model's maximum context length is {context_tokens} tokens. However, your messages resulted in "
            f"{num_tokens} tokens{'' if is_exact else ' or more'}. Please reduce the length of the messages.",
            "context_length_exceeded",
            param,
        )
        self.num_tokens = num_tokens
        self.context_tokens = context_tokens
        self.is_exact = is_exact

    def __reduce__(self) -> tuple[type[ApiError], tuple[Any, ...]]:
        """Keep all fields when the error crosses a process boundary."""
        return type(self), (self.num_tokens, self.context_tokens, self.param, self.is_exact)

    @property
    def anthropic_message(self) -> str:
        """Message with the wording of the Messages API."""
        return f"prompt is too long: {self.num_tokens} tokens > {self.context_tokens} maximum"


def api_error(error: BaseException) -> ApiError:
    """Return the error response for any error: 4xx for errors of the client, 5xx for those of the server.

    Hints of other errors name commands and options of the operator, so they stay in the log.
    """
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, KimiMlxError):
        return ApiError(500, "internal server error; see the server's log", "internal_error")
    if isinstance(error, UsageError | TextError | ImageError | EngineError):
        return ApiError(400, error.message, "invalid_value", hint=error.hint)
    if isinstance(error, StepError):
        return ApiError(500, f"{error.message}; try again, or send less", "step_failed", hint=error.hint)
    code = "ring_lost" if isinstance(error, RingError) else "unavailable"
    return ApiError(503, f"{error.message}; try again later", code, hint=error.hint)
