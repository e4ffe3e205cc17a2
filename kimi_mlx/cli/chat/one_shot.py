"""A single answer, as text or as JSON."""

from __future__ import annotations

from dataclasses import asdict

from kimi_mlx.cli.chat.answer_view import AnswerView
from kimi_mlx.cli.chat.statistics_text import statistics_line
from kimi_mlx.cli.output import print_json, stderr
from kimi_mlx.engine.events import Finished
from kimi_mlx.planner.choice import Choice
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.text.messages import Content, Delta
from kimi_mlx.units import format_count


def print_answer(conversation: Conversation, content: Content) -> None:
    """Stream the answer to stdout; reasoning and statistics go to stderr."""
    with AnswerView() as view:
        has_reasoning = False
        for item in conversation.ask(content):
            view.show(item)
            has_reasoning = has_reasoning or (isinstance(item, Delta) and bool(item.reasoning))
            if isinstance(item, Finished):
                view.finish()
                if not view.has_shown:
                    stderr.print(_empty_answer(item, has_reasoning), markup=False)
                suffix = " · stopped at the token limit" if item.reason == "length" else ""
                stderr.print(statistics_line(item.statistics) + suffix, style="dim")


def _empty_answer(finished: Finished, has_reasoning: bool) -> str:
    """Return the message for an answer without text and tool calls."""
    tokens = format_count(finished.statistics.generated_tokens, "token")
    if not has_reasoning:
        return f"the answer is empty: the model generated {tokens}, none of them text or reasoning"
    remedy = "; raise --max-tokens" if finished.reason == "length" else ""
    return f"the answer is empty: the model generated {tokens}, all of them reasoning{remedy}"


def print_answer_json(conversation: Conversation, content: Content, choice: Choice) -> None:
    """Print the complete answer as one JSON document."""
    answer = Delta()
    for item in conversation.ask(content):
        if isinstance(item, Delta):
            answer = answer + item
        elif isinstance(item, Finished):
            print_json(
                {
                    "text": answer.text,
                    "reasoning": answer.reasoning,
                    "tool_calls": [asdict(call) for call in answer.tool_calls],
                    "finish_reason": item.reason,
                    "placement": choice.to_dict(),
                    "statistics": item.statistics.to_dict(),
                }
            )
