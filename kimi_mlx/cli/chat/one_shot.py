"""A single answer, for pipes and programs: as text, held to a schema, or as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import typer

from kimi_mlx.cli.chat.chat_history import ChatHistory
from kimi_mlx.cli.chat.options import OutputOptions
from kimi_mlx.cli.chat.output.answer_view import AnswerView
from kimi_mlx.cli.chat.output.chat_status import status_of
from kimi_mlx.cli.chat.output.statistics_text import statistics_line
from kimi_mlx.cli.chat.tools.tool_loop import ToolLoop
from kimi_mlx.cli.output import error_to_dict, print_json, print_note, print_warning, silent, stderr
from kimi_mlx.engine.events import Finished, Statistics
from kimi_mlx.errors import AnswerError
from kimi_mlx.planner.choice import Choice
from kimi_mlx.session.chat_model import ChatEvent
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.text.messages import Content, Delta, ToolCall
from kimi_mlx.units import format_count


class OneShotAnswer:
    """An answer that is read to its end, and checked.

    Attributes:
        delta: all that the model wrote so far; after tool calls, in its last answer.
        finished: the end of the answer; None before it.
        statistics: statistics of all answers so far: before the last one, those with tool calls.
    """

    def __init__(self) -> None:
        self.delta = Delta()
        self.finished: Finished | None = None
        self.statistics: list[Statistics] = []

    def read(self, events: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
        """Pass events through, and collect their content."""
        for event in events:
            if isinstance(event, Delta):
                if self.finished is not None:  # the answer to the results of tools
                    self.delta, self.finished = Delta(), None
                self.delta = self.delta + event
            elif isinstance(event, Finished):
                self.finished = event
                self.statistics.append(event.statistics)
            yield event

    @property
    def is_cut(self) -> bool:
        """Whether the answer ended at the token limit."""
        return self.finished is not None and self.finished.reason == "length"

    @property
    def parsed(self) -> Any:
        """The answer as JSON; None if it is not complete JSON."""
        try:
            return json.loads(self.delta.text)
        except (ValueError, RecursionError):
            return None

    def error(self, output: OutputOptions) -> AnswerError | None:
        """Return the error of an answer that is of no use to a program; None if it is.

        An answer in text that was cut at the token limit is no error: the limit was perhaps meant.

        Args:
            output: whether calls are printed, and whether the answer must be JSON.
        """
        assert self.finished is not None
        tokens = format_count(self.finished.statistics.generated_tokens, "token")
        hint = "raise --max-tokens" if self.is_cut else None
        if not self.delta.text.strip():
            if output.json and any(isinstance(call, ToolCall) for call in self.delta.tool_calls):
                return None
            return AnswerError(f"the answer is empty: the model generated {tokens}, {self._content()}", hint=hint)
        if output.schema is not None and self.parsed is None:
            return AnswerError(f"the answer is no complete JSON: it ended after {tokens}", hint=hint)
        return None

    def _content(self) -> str:
        """Describe what there is in place of text."""
        if self.delta.tool_calls:
            return "a tool call and no text"
        return "all of them reasoning" if self.delta.reasoning else "none of them text or reasoning"


def answer_once(
    conversation: Conversation,
    content: Content,
    placement: Choice,
    output: OutputOptions,
    tools: ToolLoop,
    history: ChatHistory,
) -> None:
    """Print the answer to one prompt: the answer on stdout, all else on stderr.

    Args:
        conversation: conversation with the model, empty or continued.
        content: the prompt.
        placement: placement of the model, for JSON.
        output: what is printed, and how.
        tools: runs the calls of the model.
        history: log of the conversation, for its id in JSON.

    Raises:
        AnswerError: the answer is empty, or not complete JSON although there is a schema.
        typer.Exit: the same as JSON: the error is part of the document.
        KimiMlxError: the request is refused, or the session has failed.
    """
    answer = OneShotAnswer()

    def ask(view: AnswerView) -> Iterator[ChatEvent]:
        return answer.read(tools.run(conversation, conversation.ask(content), view))

    if output.json:
        _wait(ask, output)
        document, error = _to_dict(answer, placement, output, tools), answer.error(output)
        document["conversation"] = None if history.record is None else history.record.id
        print_json(document if error is None else {**document, **error_to_dict(error)})
        if error is not None:
            raise typer.Exit(1)
        return
    if output.no_stream:
        _wait(ask, output)
    notes = silent if output.quiet else stderr
    status, is_plain = status_of(conversation.model), output.quiet or output.plain
    with (
        AnswerView(status, output.reasoning, is_plain, notes=notes) as view,
        history.notes_in(print_note if output.quiet else view.note),
    ):
        for event in [answer.delta] if output.no_stream else ask(view):
            view.show(event)
    _print_end(answer, output)


def _wait(ask: Callable[[AnswerView], Iterator[ChatEvent]], output: OutputOptions) -> None:
    """Read an answer to its end; on a terminal, stderr shows how far it is."""
    notes = silent if output.quiet else stderr
    with AnswerView(reasoning="hide", plain=True, console=silent, notes=notes) as view:
        for event in ask(view):
            view.show(event)


def _print_end(answer: OneShotAnswer, output: OutputOptions) -> None:
    """Print the statistics of an answer.

    Raises:
        AnswerError: the answer is of no use.
    """
    assert answer.finished is not None
    error = answer.error(output)
    if not output.quiet:
        print_note(statistics_line(answer.finished.statistics))
    if error is not None:
        raise error
    if answer.is_cut:
        tokens = format_count(answer.finished.statistics.generated_tokens, "token")
        print_warning(f"the answer stopped at the token limit, after {tokens}")


def _to_dict(answer: OneShotAnswer, placement: Choice, output: OutputOptions, tools: ToolLoop) -> dict[str, Any]:
    """Return an answer as JSON; `usage` is that of all rounds, with the names of OpenAI's API."""
    assert answer.finished is not None
    prompt_tokens = sum(each.prompt_tokens for each in answer.statistics)
    completion_tokens = sum(each.generated_tokens for each in answer.statistics)
    return {
        "text": answer.delta.text,
        **({} if output.schema is None else {"parsed": answer.parsed}),
        "reasoning": answer.delta.reasoning,
        "tool_calls": [
            *(record.to_dict() for record in tools.records),
            *(asdict(call) for call in answer.delta.tool_calls),
        ],
        "finish_reason": answer.finished.reason,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in answer.statistics)},
        },
        "placement": placement.to_dict(),
        "statistics": answer.finished.statistics.to_dict(),
    }
