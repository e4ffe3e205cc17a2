"""What an API must say to be served: its answer as events of a stream, or as one object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kimi_mlx.server.conversation import Answer, AnswerEvent
from kimi_mlx.server.errors import ApiError


@dataclass(frozen=True)
class StreamEvent:
    """One event of a stream.

    Args:
        data: the line after `data:`.
        name: the line after `event:`, if there is one.
    """

    data: str
    name: str | None = None

    @classmethod
    def from_json(cls, value: Any, name: str | None = None) -> StreamEvent:
        """With JSON as its data."""
        return cls(json.dumps(value, ensure_ascii=False, separators=(",", ":")), name)


class ApiFormatter(Protocol):
    """How one API says the answers to one request; pure: items in, values out."""

    def begin(self) -> Iterable[StreamEvent]:
        """What a stream starts with, before anything is known."""
        ...

    def add(self, item: AnswerEvent) -> Iterable[StreamEvent]:
        """What an item becomes; where that is nothing for some seconds, a comment keeps the stream alive."""
        ...

    def end(self) -> Iterable[StreamEvent]:
        """What a stream ends with, after the FinishEvent of every answer."""
        ...

    def fail(self, error: ApiError) -> Iterable[StreamEvent]:
        """What a stream ends with instead, if it fails in the middle."""
        ...

    def full_response(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The object that is the whole answer."""
        ...
