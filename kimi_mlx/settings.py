"""What the environment says of the commands' defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The variables that start with `KIMI_MLX_`, read once.

    Args:
        model: `KIMI_MLX_MODEL`, the model where a command names none.
        api_key: `KIMI_MLX_API_KEY`, which opens the server.
        show_traceback: `KIMI_MLX_TRACEBACK`, if not empty: a known error shows where it came from.
    """

    model: str = "kimi-mini"
    api_key: str | None = None
    show_traceback: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read them; an empty variable counts as unset."""
        return cls(
            model=environment.get("KIMI_MLX_MODEL") or cls.model,
            api_key=environment.get("KIMI_MLX_API_KEY") or None,
            show_traceback=bool(environment.get("KIMI_MLX_TRACEBACK")),
        )
