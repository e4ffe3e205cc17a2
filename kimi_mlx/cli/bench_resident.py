"""The same model with all experts in memory, as the other side of `kimi-mlx bench --against resident`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from kimi_mlx.bench.sides import SessionSide
from kimi_mlx.cli.open_model import PreparedModel, open_session
from kimi_mlx.cli.output import closing_with_status
from kimi_mlx.engine.free_memory import free_memory_bytes
from kimi_mlx.errors import MemoryLimitError, UsageError
from kimi_mlx.model.device import device_kind
from kimi_mlx.session.session import RankMemory, Session, SessionOptions
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS
from kimi_mlx.units import format_gib

RESIDENT = "resident"
"""Name of the side."""


def check_setting(options: SessionOptions) -> None:
    """Check, before anything is loaded, that experts may be read from the SSD.

    Raises:
        UsageError: the options keep all experts in memory.
    """
    if options.expert_memory.mode == "all":
        raise _nothing_to_compare()


def open_resident_sides(
    prepared: PreparedModel, options: SessionOptions, ranks: int, streamed: Session, is_quiet: bool, stack: ExitStack
) -> list[SessionSide]:
    """Load the model once more, with all experts in memory; return both sides.

    Args:
        prepared: the model.
        options: options of the session that is open.
        ranks: number of ranks.
        streamed: that session, whose experts are partly on the SSD.
        is_quiet: whether to show no progress.
        stack: closes the model.

    Raises:
        UsageError: all experts of the open session are in memory.
        MemoryLimitError: the model does not fit beside it.
    """
    memory = streamed.status().memory
    _check_fits(memory)
    opened = open_session(prepared, replace(options, expert_memory=ALL_EXPERTS), ranks, is_quiet)
    resident = stack.enter_context(closing_with_status(opened.session, is_quiet))
    ours, both = memory[0].memory_bytes or 0, resident.status().memory[0].memory_bytes or 0
    if ranks > 1:  # in processes of their own
        return [SessionSide("kimi-mlx", streamed), SessionSide(RESIDENT, resident)]
    return [SessionSide("kimi-mlx", streamed, max(both - ours, 0)), SessionSide(RESIDENT, resident, ours)]


def _check_fits(memory: Sequence[RankMemory]) -> None:
    budgets = [rank.expert_budget for rank in memory if rank.expert_budget is not None]
    if all(budget.budget_bytes is None for budget in budgets):
        raise _nothing_to_compare()
    needed_bytes = sum(budget.rest_bytes + budget.all_bytes for budget in budgets)
    free_bytes = _free_bytes(memory)
    if needed_bytes > free_bytes:
        raise MemoryLimitError(
            f"the model with all experts in memory needs {format_gib(needed_bytes)} beside the one that reads them; "
            f"{format_gib(free_bytes)} are free",
            hint="use a smaller --expert-memory or model, or leave out `--against resident`",
        )


def _free_bytes(memory: Sequence[RankMemory]) -> int:
    """Return the memory that is free on this machine. A GPU's ranks know only their own use of it."""
    if device_kind() == "cpu":
        return free_memory_bytes()
    used_bytes = sum(rank.memory_bytes or 0 for rank in memory)
    limits = [rank.free_bytes + (rank.memory_bytes or 0) for rank in memory if rank.free_bytes is not None]
    return max(min(limits, default=0) - used_bytes, 0)


def _nothing_to_compare() -> UsageError:
    return UsageError(
        "--against resident compares with experts on the SSD, but all experts are in memory",
        hint="add for example `--expert-memory 35%`",
    )
