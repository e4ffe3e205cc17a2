"""Commands that change, store and continue conversations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.text import Text

from kimi_mlx.cli.chat.answer_turn import show_answer
from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.files.media_files import to_path
from kimi_mlx.cli.chat.input.completion import complete_files
from kimi_mlx.cli.chat.output.answer_view import AnswerView
from kimi_mlx.cli.chat.output.terminal_text import shorten, to_line
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.history_output import print_conversations, print_matches
from kimi_mlx.cli.output import print_note, stderr
from kimi_mlx.errors import UsageError
from kimi_mlx.history.export import check_target, export_text, write_text
from kimi_mlx.history.find import find_conversation, search
from kimi_mlx.history.openai_format import read_conversation
from kimi_mlx.history.plain_text import content_text
from kimi_mlx.text.messages import Delta
from kimi_mlx.units import format_count

NUM_LISTED = 10
"""Number of conversations that `/history` lists."""
UNFINISHED = "[unfinished; /retry answers again]"


class ConversationCommands:
    """Commands that change, store and continue conversations.

    Args:
        state: the conversation.
    """

    def __init__(self, state: ReplState):
        self._state = state
        self._confirmed: Path | None = None  # existing file that the last command would have replaced

    def commands(self) -> Sequence[Command]:
        """Return the commands."""
        group = "Conversation"
        return [
            Command(
                *("/undo", "", "take back the last message", self._undo, group),
                details="Removes your last message and all after it. The history keeps them, marked as removed.",
            ),
            Command(
                *("/retry", "", "answer again", self._retry, group),
                details="Removes the last answer and generates another one. The history keeps both.",
                other_names=("/regenerate",),
            ),
            Command(
                *("/fork", "", "continue in a copy", self._fork, group),
                details="The conversation so far stays in the history as it is; what follows is in the copy.",
            ),
            Command(*("/title", "[TEXT]", "show or set the title", self._title, group), other_names=("/rename",)),
            Command(
                *("/history", "[WORDS]", "list or search past chats", self._history, group),
                details="Lists the latest conversations, or those with all words in one message or in the title.",
            ),
            Command(
                *("/continue", "[ID]", "continue a past chat", self._continue, group),
                details="ID is an id, its beginning, or a title; without it, the latest other conversation.",
                complete=self._complete_id,
                other_names=("/resume",),
            ),
            Command(
                *("/save", "FILE", "save as JSON", self._save, group),
                details="OpenAI's format: messages with the system prompt; images as data URLs.",
                complete=complete_files,
            ),
            Command(
                *("/load", "FILE", "load a saved conversation", self._load, group),
                details='JSON in OpenAI\'s format: {"messages": [...]}, or a list of messages. '
                "The conversation so far stays in the history.",
                complete=complete_files,
            ),
            Command(*("/export", "FILE.md", "save as Markdown", self._export, group), complete=complete_files),
        ]

    def show_resumed(self) -> None:
        """Show the end of a conversation of the history that continues here."""
        conversation, messages = self._state.history.describe(self._state.conversation)
        turns = format_count(conversation.num_turns, "turn")
        print_note(f"continuing `{conversation.id}` · {to_line(conversation.title)} · {turns}\n")
        users = [index for index, item in enumerate(messages) if item.message.role == "user"]
        if not users:
            return
        question, *answers = messages[users[-1] :]
        stderr.print(Text(f"> {shorten(to_line(content_text(question.message.content)), stderr.width - 2)}"))
        with AnswerView(reasoning="hide") as view:
            for item in answers:
                if item.message.role == "assistant":
                    view.show(Delta(text=content_text(item.message.content)))
        if not answers:
            print_note("[not answered; /retry answers it]")
        elif answers[-1].is_unfinished:
            print_note(UNFINISHED)

    def _undo(self, argument: str) -> None:
        content = self._state.conversation.undo()
        self._state.count_used()
        taken = None if content is None else shorten(to_line(content_text(content)), 60)
        print_note("there is no message to take back" if taken is None else f"took back: {taken}")

    def _retry(self, argument: str) -> None:
        show_answer(self._state, self._state.conversation.retry())

    def _fork(self, argument: str) -> None:
        log = self._state.history.require_log()
        copy = log.fork()
        print_note(f"this is now the copy `{copy.id}`; `{copy.parent}` stays as it is")

    def _title(self, argument: str) -> None:
        log = self._state.history.require_log()
        if argument:
            log.rename(to_line(argument))
            print_note("title set")
        else:
            conversation = log.conversation
            print_note("there is no message yet" if conversation is None else to_line(conversation.title))

    def _history(self, argument: str) -> None:
        store = self._state.history.store
        if argument:
            matches = search(store, argument.split())[:NUM_LISTED]
            print_matches(matches, argument.split(), stderr)
            found = bool(matches)
        else:
            conversations = store.conversations(NUM_LISTED)
            found = bool(conversations)
            if found:
                print_conversations(conversations, stderr)
        print_note("/continue ID continues one" if found else "nothing found")

    def _continue(self, argument: str) -> None:
        history = self._state.history
        current = history.log.conversation if history.log is not None else None
        if argument:
            record = find_conversation(history.store, argument)
        else:
            others = [item for item in history.store.conversations(2) if current is None or item.id != current.id]
            if not others:
                raise UsageError("there is no other conversation in the history")
            record = others[0]
        if current is not None and record.id == current.id:
            raise UsageError(f"`{record.id}` is this conversation", hint="/history lists the others")
        self._check_kept()
        history.resume(self._state.conversation, record)
        self._state.restart()
        self.show_resumed()

    def _complete_id(self, argument: str) -> Iterable[str]:
        return [item.id for item in self._state.history.store.conversations(50) if item.id.startswith(argument)]

    def _save(self, argument: str) -> None:
        self._write(argument, "/save chat.json", None)

    def _export(self, argument: str) -> None:
        self._write(argument, "/export chat.md", ".md")

    def _write(self, argument: str, example: str, suffix: str | None) -> None:
        """Write the conversation to a file; an existing one only if the command is repeated.

        Args:
            argument: name of the file.
            example: example of the command, for the error.
            suffix: suffix of a name that has none.
        """
        conversation, messages = self._state.history.describe(self._state.conversation)
        if not messages:
            raise UsageError("the conversation has no messages yet", hint="send one first")
        if not argument:
            raise UsageError("the name of the file is missing", hint=f"type `{example}`")
        path = to_path(argument)
        if suffix is not None and not path.suffix:
            path = path.with_suffix(suffix)
        if check_target(path) and self._confirmed != path:
            self._confirmed = path
            raise UsageError(f"`{path}` exists", hint="press Enter again to replace it, or change the name")
        self._confirmed = None
        write_text(path, export_text(conversation, messages, path if suffix is not None else None))
        print_note(f"wrote {path}")

    def _load(self, argument: str) -> None:
        if not argument:
            raise UsageError("the name of the file is missing", hint="type `/load chat.json`")
        loaded = read_conversation(to_path(argument))
        self._check_kept()
        state = self._state
        state.history.replace_messages(state.conversation, loaded)
        state.restart()
        print_note(f"loaded {format_count(len(loaded.messages), 'message')} from {argument}")

    def _check_kept(self) -> None:
        """Check that the conversation is in the history, because another one takes its place.

        Raises:
            UsageError: it would be lost.
        """
        history, messages = self._state.history, self._state.conversation.messages
        if messages and history.record is None:
            raise UsageError(
                "the conversation would be lost: it is not stored in the history",
                hint="/save FILE stores it in a file; /clear drops it",
            )
