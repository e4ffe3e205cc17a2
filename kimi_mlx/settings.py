"""Defaults of the commands from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The `KIMI_MLX_` environment variables, read once.

    Args:
        model: `KIMI_MLX_MODEL`, the default model.
        api_key: `KIMI_MLX_API_KEY`, the API key of the server.
        show_traceback: `KIMI_MLX_TRACEBACK`; if not empty, errors for the user include a traceback.
    """

    model: str = "kimi-mini"
    api_key: str | None = None
    show_traceback: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables. An empty one counts as unset."""
        return cls(
            model=environment.get("KIMI_MLX_MODEL") or cls.model,
            api_key=environment.get("KIMI_MLX_API_KEY") or None,
            show_traceback=bool(environment.get("KIMI_MLX_TRACEBACK")),
        )
