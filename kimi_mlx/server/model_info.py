"""Names and properties of the served model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from kimi_mlx.server.errors import ApiError

DEFAULT_NAME = "default"


@dataclass(frozen=True)
class ModelInfo:
    """The served model.

    Args:
        name: name in responses.
        aliases: other names that requests may use.
        context_tokens: size of the context.
        created: start of serving, as a Unix time in seconds.
        media: kinds of media that requests may have besides text: `image`, `video`.
        title: name for people, which the web page shows; the licence of Kimi K2's weights asks large products to show
            it. Empty for the name.
    """

    name: str
    aliases: Sequence[str]
    context_tokens: int
    created: int
    media: Sequence[str] = ()
    title: str = ""

    @property
    def names(self) -> list[str]:
        """All names that requests may use."""
        return list(dict.fromkeys([self.name, *self.aliases, DEFAULT_NAME]))

    def resolve(self, name: str | None) -> str:
        """Return the name for the response to a request that names a model, or none.

        Raises:
            ApiError: 404, the request names another model.
        """
        if name is None or name in self.names:
            return self.name
        names = ", ".join(f"`{name}`" for name in self.names)
        message = f"the model `{name:.100}` is not served here; available: {names}"
        raise ApiError(404, message, "model_not_found", "model", hint="--served-name adds names")

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of GET /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "kimi-mlx",
            # the same field as in vLLM, for tools that look for it
            "max_model_len": self.context_tokens,
            "context_length": self.context_tokens,
            # the same field as in llama.cpp and OpenRouter
            "architecture": {"input_modalities": ["text", *self.media], "output_modalities": ["text"]},
            # the same fields as in Moonshot's API
            "supports_image_in": "image" in self.media,
            "supports_video_in": "video" in self.media,
            "aliases": self.names[1:],
            # fields of Anthropic's API, which has the same path
            "type": "model",
            "display_name": self.title or self.name,
            "created_at": datetime.fromtimestamp(self.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
