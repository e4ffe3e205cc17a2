"""One answer of a conversation in the terminal: shown as it comes, and stopped by Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from types import FrameType

from kimi_mlx.cli.chat.output.answer_view import AnswerView
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.chat.signal_handlers import signal_handlers
from kimi_mlx.cli.chat.tools.tool_loop import ToolLoop
from kimi_mlx.cli.output import print_note, stderr
from kimi_mlx.engine.events import Encoded, Finished, FinishReason, Prefilled
from kimi_mlx.session.chat_model import ChatEvent
from kimi_mlx.session.conversation import Conversation

REMARKS: dict[FinishReason, str] = {
    "cancelled": "stopped",
    "length": "stopped at the token limit",
}


def show_answer(state: ReplState, answer: Generator[ChatEvent, None, None]) -> None:
    """Show an answer of the conversation.

    Args:
        state: the conversation.
        answer: result of `ask`, `answer` or `retry` of the conversation, not started.

    Raises:
        KimiMlxError: the request is refused, or the model has failed.
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """
    conversation = state.conversation
    remark = ""
    with (
        AnswerView(state.status, state.reasoning, state.is_plain) as view,
        closing(state.tools.run(conversation, answer, view)) as events,
        _ctrl_c_stops(conversation, state.tools) as is_stopped,
        state.history.notes_in(view.note),
    ):
        stderr.print()
        for item in events:
            if isinstance(item, Prefilled | Encoded) and is_stopped():
                conversation.cancel()  # again: it may not have begun at the first call
            view.show(item)
            if isinstance(item, Finished):
                state.answers.append(item.statistics)
                remark = REMARKS.get(item.reason, "" if view.has_shown else "no answer")
        view.finish()
        if is_stopped() or remark:
            print_note(f"[{remark or REMARKS['cancelled']}]")


@contextmanager
def _ctrl_c_stops(conversation: Conversation, tools: ToolLoop) -> Generator[Callable[[], bool], None, None]:
    """Make Ctrl-C stop the answer with its tool calls, and a second Ctrl-C raise KeyboardInterrupt.

    Yields:
        function that returns whether Ctrl-C was pressed.
    """
    is_stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        if is_stopped:
            raise KeyboardInterrupt
        is_stopped = True
        tools.cancel()
        conversation.cancel()

    with signal_handlers({signal.SIGINT: stop}):
        yield lambda: is_stopped
