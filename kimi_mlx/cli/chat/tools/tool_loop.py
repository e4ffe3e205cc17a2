"""Answers with tools: run the calls of the model, and let it answer again with the results, until it calls no more."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from kimi_mlx.cli.chat.options import ToolOptions
from kimi_mlx.cli.chat.tools.tool_permissions import Pausable, Permissions
from kimi_mlx.cli.chat.tools.tool_results import message_content
from kimi_mlx.engine.events import Finished
from kimi_mlx.session.chat_model import ChatEvent
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.text.messages import ToolCall
from kimi_mlx.tools.results import ToolResult
from kimi_mlx.tools.servers import McpServers
from kimi_mlx.units import format_count

POLL_S = 0.1
"""Interval at which a wait for results looks for Ctrl-C."""

CANCELLED = ToolResult("cancelled by the user", is_error=True)
NOT_ALLOWED = ToolResult("the user did not allow this call", is_error=True)


class ToolView(Pausable, Protocol):
    """What the loop shows; kimi_mlx.cli.chat.output.answer_view.AnswerView is one."""

    def tool_started(self, call: ToolCall) -> None:
        """Show that a call runs."""
        ...

    def tool_finished(self, call: ToolCall, result: str, is_error: bool = False) -> None:
        """Show the result of a call."""
        ...

    def note(self, text: str) -> None:
        """Show a message of the program itself."""
        ...


@dataclass(frozen=True)
class ToolRecord:
    """A call that the loop has answered.

    Attributes:
        call: call of the model.
        server: name of its server; empty if there is no such tool.
        result: its result.
    """

    call: ToolCall
    server: str
    result: ToolResult

    def to_dict(self) -> dict[str, Any]:
        """Return the call for JSON."""
        result = {"server": self.server, "result": self.result.text, "is_error": self.result.is_error}
        return {**asdict(self.call), **result}


class ToolLoop:
    """Runs the tools of a conversation. Without servers, answers pass through unchanged.

    Args:
        servers: MCP servers; None for no tools.
        permissions: decides which calls may run; None allows none.
        max_rounds: maximum number of rounds of calls in one answer.

    Attributes:
        records: all calls so far, with their results.
    """

    def __init__(
        self,
        servers: McpServers | None = None,
        permissions: Permissions | None = None,
        max_rounds: int = ToolOptions.max_rounds,
    ):
        self.servers = servers
        self.permissions = permissions or Permissions()
        self.records: list[ToolRecord] = []
        self._max_rounds = max_rounds
        self._is_cancelled = threading.Event()

    def run(
        self, conversation: Conversation, answer: Generator[ChatEvent, None, None], view: ToolView
    ) -> Generator[ChatEvent, None, None]:
        """Return the events of an answer; after each answer with calls, run them, and continue with the next answer.

        Each answer ends with a Finished event of its own.

        Args:
            conversation: conversation that the answer belongs to; its tools become those of the servers.
            answer: result of `ask`, `answer` or `retry` of the conversation, not started.
            view: where calls, results and notes are shown.

        Raises:
            KimiMlxError: the request is refused, or the model has failed.
            KeyboardInterrupt: Ctrl-C was pressed twice.
        """
        self._is_cancelled.clear()
        return self._run(conversation, answer, view)

    def _run(
        self, conversation: Conversation, answer: Generator[ChatEvent, None, None], view: ToolView
    ) -> Generator[ChatEvent, None, None]:
        num_rounds = 0
        while True:
            self._offer_tools(conversation, view)
            is_complete = False
            with closing(answer), self._without_tools(conversation, num_rounds > self._max_rounds):
                for event in answer:
                    is_complete = isinstance(event, Finished) and event.reason != "cancelled"
                    yield event
            last = conversation.messages[-1] if is_complete else None
            calls = last.tool_calls if last is not None and last.role == "assistant" else ()
            if not calls or self.servers is None:
                return
            num_rounds += 1
            if num_rounds > self._max_rounds:
                self._refuse_rest(conversation, calls, view)
            else:
                self._run_calls(conversation, calls, view)
            if self._is_cancelled.is_set():
                return
            answer = conversation.answer()

    def cancel(self) -> None:
        """End the calls that are running, and the answer with them. Safe in a signal handler."""
        self._is_cancelled.set()

    def _offer_tools(self, conversation: Conversation, view: ToolView) -> None:
        """Offer the model the tools that the servers have now, and show what has happened to the servers."""
        if self.servers is None:
            return
        tools = tuple(tool.declaration for tool in self.servers.tools)
        if tools != tuple(conversation.options.tools):
            conversation.options = replace(conversation.options, tools=tools)
        for note in self.servers.take_notes():
            view.note(note)

    @contextmanager
    def _without_tools(self, conversation: Conversation, is_forbidden: bool) -> Generator[None]:
        """Let an answer call no tools, if the rounds are used up."""
        choice = conversation.options.tool_choice
        if is_forbidden:
            conversation.options = replace(conversation.options, tool_choice="none")
        try:
            yield
        finally:
            conversation.options = replace(conversation.options, tool_choice=choice)

    def _run_calls(self, conversation: Conversation, calls: Sequence[ToolCall], view: ToolView) -> None:
        """Run calls at the same time, and add their results to the conversation in their order."""
        results: dict[int, ToolResult] = {}
        try:
            running = self._start_calls(calls, results, view)
            while running:
                done, _ = wait(running, POLL_S, FIRST_COMPLETED)
                if self._is_cancelled.is_set():
                    for future in running:
                        future.cancel()
                    return
                for future in done:
                    i = running.pop(future)
                    results[i] = future.result()
                    view.tool_finished(calls[i], results[i].text, results[i].is_error)
                if done and running:
                    view.tool_started(calls[min(running.values())])
        finally:  # each call has a result, whatever has happened
            self._add_results(conversation, calls, [results.get(i, CANCELLED) for i in range(len(calls))])

    def _start_calls(
        self, calls: Sequence[ToolCall], results: dict[int, ToolResult], view: ToolView
    ) -> dict[Future[ToolResult], int]:
        """Ask for permission for each call, then start the calls that have it.

        Args:
            calls: calls of one answer.
            results: receives the results of calls that may not run, by index.
            view: where questions are asked.

        Returns:
            Index of each running call.
        """
        assert self.servers is not None
        tools = {tool.name: tool for tool in self.servers.tools}
        for i, call in enumerate(calls):
            tool = tools.get(call.name)
            if tool is not None and not self.permissions.allow(call, tool, view, self._is_cancelled):
                results[i] = NOT_ALLOWED
                view.tool_finished(call, results[i].text, is_error=True)
                if self.permissions.ask is None:
                    view.note(f"to allow it, add --allow {call.name}")
            if self._is_cancelled.is_set():
                return {}
        running: dict[Future[ToolResult], int] = {}
        for i, call in enumerate(calls):
            if i not in results:
                view.tool_started(call)
                running[self.servers.call(call.name, call.arguments)] = i
        return running

    def _refuse_rest(self, conversation: Conversation, calls: Sequence[ToolCall], view: ToolView) -> None:
        """Answer calls beyond the limit of rounds; the next answer is without tools."""
        rounds = format_count(self._max_rounds, "round")
        view.note(f"stopped calling tools after {rounds} (--max-rounds)")
        refused = ToolResult(f"not run: the limit of {rounds} of calls is reached; answer with what you have", True)
        self._add_results(conversation, calls, [refused] * len(calls))

    def _add_results(
        self, conversation: Conversation, calls: Sequence[ToolCall], results: Sequence[ToolResult]
    ) -> None:
        assert self.servers is not None
        servers = {tool.name: tool.tool.server for tool in self.servers.tools}
        for call, result in zip(calls, results, strict=True):
            self.records.append(ToolRecord(call, servers.get(call.name, ""), result))
            conversation.add_tool_result(call, message_content(conversation, result, len(calls)))
