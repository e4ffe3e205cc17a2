"""The protocol of a model that answers messages: loaded by this process, or behind a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kimi_mlx.engine.events import Encoded, Finished, Interrupted, Prefilled, Resumed
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.runtime.answer_grammar import AnswerFormat
from kimi_mlx.text.media import MediaKind
from kimi_mlx.text.messages import Delta, Message

if TYPE_CHECKING:
    from kimi_mlx.images.video import MediaChunk
    from kimi_mlx.session.model_status import ModelStatus

ChatEvent = Delta | Encoded | Prefilled | Finished | Interrupted | Resumed
"""Event of an answer: new text, or progress."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(AnswerFormat):
    """Options of the answers in a conversation. Options that are not set follow the model's recommendation.

    Args:
        max_tokens: maximum number of new tokens per answer; None is the checkpoint's default, usually the rest of the
            context.
        sampling: sampling parameters by name of the field of kimi_mlx.engine.request.Sampling.
        template_kwargs: variables of the chat template, such as `thinking`.
    """

    max_tokens: int | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict[str, "float | int"])
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def thinking(self) -> bool | None:
        """Whether the model reasons first; None leaves it to the chat template."""
        return self.template_kwargs.get("thinking")


class ChatModel(Protocol):
    """A model that answers messages. Close it after use (contextlib.closing)."""

    @property
    def name(self) -> str:
        """Name for people: an alias, a folder or a repository."""
        ...

    @property
    def context(self) -> int:
        """Maximum number of tokens of a prompt and its answer."""
        ...

    @property
    def image_error(self) -> KimiMlxError | None:
        """Error for messages with images if the model does not see images, with reason and remedy; None if it does."""
        ...

    @property
    def can_switch_thinking(self) -> bool:
        """Whether reasoning can be turned on and off: True if it is not known."""
        ...

    def generate(self, messages: Sequence[Message], options: ChatOptions) -> Iterator[ChatEvent]:
        """Answer messages; the last event is Finished. Closing the iterator cancels the answer.

        Args:
            messages: conversation; a system prompt is its first message. Ids of tool calls may have any format.
            options: options of the answer.

        Raises:
            KimiMlxError: the request is refused, or the model has failed.
        """
        ...

    def count_tokens(self, messages: Sequence[Message], options: ChatOptions) -> int:
        """Return the number of tokens of the prompt that generate() would build, even if it exceeds the context.

        Raises:
            KimiMlxError: the messages cannot be rendered, or the server does not answer.
        """
        ...

    def prepare_media(self, kind: MediaKind, source: str | bytes, place: str) -> Sequence[MediaChunk]:
        """Return an image as one chunk, or the chunks of a video, as the model sees them.

        Args:
            kind: `image` or `video`.
            source: data URL, or contents of a file.
            place: name of the file, for error messages.

        Raises:
            ImageError: the image or video cannot be read or exceeds a limit.
        """
        ...

    def recommended_sampling(self, options: ChatOptions) -> Mapping[str, float | int]:
        """Return the sampling parameters, by name, of an answer whose options set none; empty if they are not known.

        `max_tokens` is among them if the model has a limit of its own.

        Args:
            options: options of the answer: with and without thinking, the recommendations may differ.
        """
        ...

    def status(self) -> ModelStatus:
        """Return what runs where. This may ask the server.

        Raises:
            KimiMlxError: the server does not answer.
        """
        ...

    def cancel(self) -> None:
        """Cancel the answers of this chat. Safe in a signal handler."""
        ...

    def reset(self) -> None:
        """Drop the KV caches of this chat, if it does not share them with others."""
        ...

    def close(self) -> None:
        """Cancel the answers and release the model or the connection."""
        ...
