"""The setting `--expert-memory`: memory for routed experts on each rank."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kimi_mlx.errors import UsageError
from kimi_mlx.units import MB, parse_bytes

EXPERT_MEMORY_HINT = "use `auto`, `all`, a size such as `40GB`, or a share of the experts such as `35%`"

_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


@dataclass(frozen=True)
class ExpertMemory:
    """Memory for routed experts on each rank. Experts that are not in memory are read from the SSD.

    Args:
        mode: `all` keeps all experts in memory; `auto` keeps as many as fit; `size` keeps as many as fit into
            `num_bytes` or `share`.
        num_bytes: bytes for experts, in mode `size`.
        share: fraction of the bytes of a rank's experts, 0 to 1, in mode `size`.
    """

    mode: Literal["auto", "all", "size"] = "auto"
    num_bytes: int | None = None
    share: float | None = None

    def __str__(self) -> str:
        """Return the setting as `parse` reads it."""
        if self.share is not None:
            return f"{100 * self.share:g}%"
        return self.mode if self.num_bytes is None else str(self.num_bytes)

    @classmethod
    def parse(cls, text: str) -> ExpertMemory:
        """Parse `auto`, `all`, a size such as `40GB` or `40 GiB`, or a share of the experts such as `35%`.

        Raises:
            UsageError: the text is none of these.
        """
        name = text.strip().lower()
        if name in ("auto", "all"):
            return cls("auto" if name == "auto" else "all")
        if (match := _SHARE.fullmatch(name)) is not None:
            share = float(match[1]) / 100
            if share > 1:
                raise UsageError(f"{text} of the experts is more than 100 %", hint=EXPERT_MEMORY_HINT)
            return cls("size", share=share)
        try:
            size = parse_bytes(text)
        except ValueError:
            raise UsageError(f"`{text}` is not an amount of memory for experts", hint=EXPERT_MEMORY_HINT) from None
        if 0 < size < MB:
            raise UsageError(f"`{text}` is less than 1 MB of memory for experts", hint=EXPERT_MEMORY_HINT)
        return cls("size", num_bytes=size)


ALL_EXPERTS = ExpertMemory("all")
AUTO = ExpertMemory()
