"""The model that is served: its names, and what everybody may know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from kimi_mlx.server.errors import ApiError

DEFAULT_NAME = "default"


@dataclass(frozen=True)
class ModelInfo:
    """The model that is served.

    Args:
        name: that answers bear.
        aliases: other names that it may be asked for by.
        context_tokens: how many tokens it holds.
        created: since when it is served, in seconds of Unix.
    """

    name: str
    aliases: Sequence[str]
    context_tokens: int
    created: int

    @property
    def names(self) -> list[str]:
        """All that it may be asked for by."""
        return list(dict.fromkeys([self.name, *self.aliases, DEFAULT_NAME]))

    def resolve(self, name: str | None) -> str:
        """The name that answers bear.

        Raises:
            ApiError: 404, another model is asked for.
        """
        if name is None or name in self.names:
            return self.name
        names = ", ".join(f"`{each}`" for each in self.names)
        message = f"the model `{name:.100}` is not served here; there is {names} (`--served-name` gives it others)"
        raise ApiError(404, message, "model_not_found", "model")

    def to_dict(self) -> dict[str, Any]:
        """As GET /v1/models lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "kimi-mlx",
            # as other servers name it, for tools that look for it
            "max_model_len": self.context_tokens,
            "context_length": self.context_tokens,
            "aliases": self.names[1:],
            # as Anthropic's API has it, on the same path
            "type": "model",
            "display_name": self.name,
            "created_at": datetime.fromtimestamp(self.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
