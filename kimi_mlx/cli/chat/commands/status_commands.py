"""Commands that show what runs where, how fast, and what the planner says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.output.statistics_text import conversation_line, statistics_line
from kimi_mlx.cli.chat.output.terminal_text import to_line
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.output import print_note, slow_status, stderr
from kimi_mlx.cli.placement import SINGLE_RANK
from kimi_mlx.cli.status_tables import describe_ranks, facts_table, run_facts
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.planner.choice import Choice
from kimi_mlx.planner.memory import HostMemory
from kimi_mlx.planner.search import Option, make_plan
from kimi_mlx.session.model_status import ModelStatus
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.units import format_gib, format_rate

TABLE_WIDTH = 66
"""Number of columns from which the memory of hosts is shown as a table."""


class StatusCommands:
    """Commands that show what runs where, how fast, and what the planner says.

    Args:
        state: the conversation.
    """

    def __init__(self, state: ReplState):
        self._state = state

    def commands(self) -> Sequence[Command]:
        """Return the commands."""
        return [
            Command(
                *("/model", "", "what runs where, memory", self._model, "Model"),
                details="Shows the model, its hosts and what each holds, the context in use, and memory.",
                hint="to use another model, exit and type `kimi-mlx chat MODEL --continue`",
            ),
            Command(
                *("/plan", "", "the planner's prediction", self._plan, "Model"),
                details="Shows why the model is split as it is, and the memory that the planner expects on each host. "
                "`kimi-mlx plan` compares other splits and machines.",
            ),
            Command(
                *("/stats", "", "tokens and speed so far", self._stats, "Model"),
                details="Shows the statistics of the last answer and of the conversation.",
            ),
        ]

    def _model(self, argument: str) -> None:
        conversation = self._state.conversation
        with slow_status() as set_status:
            set_status("reading the status of the model")
            status = conversation.model.status()
            used = conversation.count_tokens() if conversation.messages else 0
        stderr.print(describe_model(status, used, stderr.width), soft_wrap=False)

    def _plan(self, argument: str) -> None:
        placement = self._state.placement
        if placement is None or not placement.strategy:
            print_note("the server has placed the model; `/model` shows how, `kimi-mlx plan` predicts other placements")
            return
        prediction = None if placement.memory or placement.reason != SINGLE_RANK.reason else self._prediction()
        stderr.print(describe_plan(placement, prediction, stderr.width), soft_wrap=False)

    def _prediction(self) -> Option | str:
        """Return the planner's prediction for this machine alone, or the reason why there is none."""
        from kimi_mlx.cli.plan_inputs import planned_shape, this_machine  # the tables of the planner

        try:
            shape = planned_shape(self._state.conversation.model.name)
            plan = make_plan(shape, (this_machine(),), (), min(CONTEXT_TOKENS, shape.context_tokens))
        except KimiMlxError as error:
            return error.message
        return plan.options[0] if plan.options else "; ".join(plan.notes)

    def _stats(self, argument: str) -> None:
        answers = self._state.answers
        if not answers:
            print_note("there is no answer yet")
            return
        print_note(f"last answer: {statistics_line(answers[-1])}")
        print_note(f"conversation: {conversation_line(answers)}")


def describe_model(status: ModelStatus, used_tokens: int, width: int) -> RenderableType:
    """Return the status of a model: what runs where, the context in use, and memory.

    Args:
        status: status of the model.
        used_tokens: number of tokens of the conversation.
        width: width of the terminal.
    """
    table = facts_table(_model_facts(status, used_tokens))
    if not any(rank.share or rank.weights_bytes or rank.memory_bytes for rank in status.ranks):
        return table
    return Group(table, Text(), describe_ranks(status.ranks, width))


def _model_facts(status: ModelStatus, used_tokens: int) -> Iterator[tuple[str, str]]:
    yield "model", status.model
    if status.url is not None:
        yield "server", status.url
    if status.placement:
        yield "placement", status.placement
    if not status.is_up:
        yield "state", f"not answering: {status.reason or 'unknown reason'}"
    context = f"{used_tokens:,} tokens"
    if status.context_tokens:
        context = f"{used_tokens:,} of {status.context_tokens:,} tokens ({used_tokens / status.context_tokens:.0%})"
    yield "context", context
    if status.cached_tokens:
        yield "cached", f"{status.cached_tokens:,} tokens in all conversations"
    if status.active or status.waiting:
        yield "requests", f"{status.active} running, {status.waiting} waiting"
    yield from run_facts(status)


def describe_plan(placement: Choice, prediction: Option | str | None, width: int) -> RenderableType:
    """Return why a model is split as it is, and the memory that the planner expects on each host.

    Args:
        placement: placement of the model.
        prediction: prediction for one machine, or the reason why there is none; None to show neither.
        width: width of the terminal.
    """
    lines = [Text(f"{placement.strategy}: {placement.reason}")]
    memory = placement.memory
    if isinstance(prediction, str):
        lines.append(Text(f"no prediction: {prediction}", style="dim"))
    elif prediction is not None:
        decode, prefill = (format_rate(rate) for rate in (prediction.decode_tok_per_s, prediction.prefill_tok_per_s))
        longest, experts = prediction.longest_context, prediction.experts
        context = f"context up to {longest:,} tokens" if longest else "but it does not fit"
        lines.append(Text(f"predicted: decode {decode}, prefill {prefill}, {context}"))
        if experts is not None:
            share = f"{100 * experts.streaming.kept_share:.0f} % of the experts in memory, the others on the SSD"
            lines.append(Text(f"{share}; assumed hit rate {100 * experts.hit_rate:.0f} %"))
        memory = prediction.memory
    if not memory:
        return Group(*lines)
    return Group(*lines, Text(), _memory_table(memory) if width >= TABLE_WIDTH else _memory_lines(memory))


def _memory_table(hosts: Sequence[HostMemory]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("host", "weights", "cache", "workspace", "needed", "GPU may use"):
        table.add_column(name, justify="left" if name == "host" else "right", overflow="fold")
    for host in hosts:
        sizes = (host.weights_bytes, host.cache_bytes, host.workspace_bytes, host.needed_bytes, host.gpu_bytes)
        table.add_row(Text(to_line(host.host)), *(format_gib(size) for size in sizes))
    return table


def _memory_lines(hosts: Sequence[HostMemory]) -> Group:
    """Return the memory of the hosts for a narrow terminal, one after the other."""
    lines: list[Text] = []
    for host in hosts:
        needed, limit = format_gib(host.needed_bytes), format_gib(host.gpu_bytes)
        lines.append(Text(to_line(f"{host.host}: needs {needed}, its GPU may use {limit}")))
    return Group(*lines)
