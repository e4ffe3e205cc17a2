"""Memory for routed experts: sizes of a rank's share, and number of experts that it keeps in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kimi_mlx.errors import MemoryLimitError
from kimi_mlx.model.expert_budget import MAX_STAGING, STAGING_SHARE, StreamedLayer, min_expert_bytes
from kimi_mlx.sizing.engine_limits import StreamingLimits
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.units import format_gib

RESERVE = 0.05
"""Share of the free memory that `auto` leaves free: sizes are estimates, and MLX keeps freed buffers."""


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of a rank's share of a model, in bytes of memory.

    Args:
        rest_bytes: everything except the routed experts. Every token needs it, so it always stays in memory.
        expert_bytes: one routed expert (this rank's rows of it), for each MoE layer on the rank.
        num_held: number of routed experts per layer on the rank.
        num_chosen: number of experts per layer that a token chooses.
    """

    rest_bytes: int
    expert_bytes: Sequence[int]
    num_held: int
    num_chosen: int

    @property
    def num_experts(self) -> int:
        """Number of routed experts in all layers of the rank."""
        return len(self.expert_bytes) * self.num_held

    @property
    def all_bytes(self) -> int:
        """Size of all routed experts of the rank."""
        return self.num_held * sum(self.expert_bytes)

    @property
    def staging_bytes(self) -> int:
        """Size of the smallest staging area."""
        return min_expert_bytes(self._layers, self.num_chosen)

    @property
    def _layers(self) -> list[StreamedLayer]:
        return [StreamedLayer(self.num_held, size) for size in sorted(set(self.expert_bytes))]

    def num_kept(self, budget_bytes: int | None) -> int:
        """Return the approximate number of experts that stay in memory; kimi_mlx.model.expert_budget has the exact one.

        Args:
            budget_bytes: memory for experts, staging area included; None for all experts.
        """
        if budget_bytes is None or budget_bytes >= self.all_bytes:
            return self.num_experts
        staging_bytes = max(
            self.staging_bytes, min(budget_bytes // STAGING_SHARE, MAX_STAGING * max(self.expert_bytes))
        )
        return max(int((budget_bytes - staging_bytes) * len(self.expert_bytes) / sum(self.expert_bytes)), 0)

    def budget(self, setting: ExpertMemory, free_bytes: int, other_bytes: int) -> int | None:
        """Return the memory for experts, staging area included; None to keep all of them in memory.

        Args:
            setting: the user's setting.
            free_bytes: memory that is free before anything is loaded.
            other_bytes: memory for KV caches and prefill.

        Raises:
            MemoryLimitError: the rest of the model with the smallest budget, or with the set one, does not fit.
        """
        if setting.mode == "all" or not self.num_experts:
            return None
        if setting.mode == "size":
            size = setting.num_bytes if setting.share is None else round(setting.share * self.all_bytes)
            assert size is not None
            size = min(size, self.all_bytes)
            smallest_bytes = self.rest_bytes + min(self.staging_bytes, self.all_bytes)
            if smallest_bytes > free_bytes:
                raise does_not_fit(smallest_bytes, free_bytes)
            if self.rest_bytes + size > free_bytes:
                raise MemoryLimitError(
                    f"the model needs {format_gib(self.rest_bytes + size)} with {format_gib(size)} of experts in "
                    f"memory; {format_gib(free_bytes)} are free",
                    hint="use `--expert-memory auto`, or less",
                )
            return None if size == self.all_bytes else size
        if self.rest_bytes + self.all_bytes + other_bytes <= free_bytes:
            return None
        smallest_bytes = self.rest_bytes + self.staging_bytes
        if smallest_bytes > free_bytes:
            raise does_not_fit(smallest_bytes, free_bytes)
        left = (1 - RESERVE) * free_bytes - self.rest_bytes - other_bytes
        return max(int(left), self.staging_bytes)


@dataclass(frozen=True)
class ExpertBudget:
    """Memory for the routed experts of a rank, and limits if a rank reads experts from its SSD.

    Args:
        budget_bytes: memory for experts, staging area included; None if all experts of this rank stay in memory.
        num_kept: approximate number of experts that stay in memory.
        num_experts: number of routed experts of the rank.
        all_bytes: size of all of them.
        token_bytes: size of the experts that a token chooses, in all layers of the rank.
        rest_bytes: size of everything else.
        limits: limits that all ranks share.
    """

    budget_bytes: int | None
    num_kept: int
    num_experts: int
    all_bytes: int
    token_bytes: int
    rest_bytes: int
    limits: StreamingLimits

    @property
    def kept_share(self) -> float:
        """Fraction of the experts that stay in memory."""
        return self.num_kept / self.num_experts if self.num_experts else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ExpertBudget:
        """Read the output of to_dict."""
        fields: dict[str, Any] = {**value, "limits": StreamingLimits(**value["limits"])}
        return cls(**fields)

    @classmethod
    def of(cls, sizes: ExpertSizes, budget_bytes: int | None, limits: StreamingLimits) -> ExpertBudget:
        """Return the budget of a rank with these sizes."""
        token_bytes = min(sizes.num_chosen, sizes.num_held) * sum(sizes.expert_bytes)
        kept = sizes.num_kept(budget_bytes)
        return cls(budget_bytes, kept, sizes.num_experts, sizes.all_bytes, token_bytes, sizes.rest_bytes, limits)


def does_not_fit(smallest_bytes: int, free_bytes: int) -> MemoryLimitError:
    """Return the error for a model that does not fit even if its experts are read from the SSD.

    Args:
        smallest_bytes: minimum memory of the model.
        free_bytes: memory that the model may use.
    """
    return MemoryLimitError(
        f"the model needs {format_gib(smallest_bytes)} even if its experts are read from the SSD; "
        f"{format_gib(free_bytes)} are free",
        hint="quit other programs, add a host (`kimi-mlx plan` shows what each needs), or choose a smaller model: "
        "`kimi-mlx models`",
    )
