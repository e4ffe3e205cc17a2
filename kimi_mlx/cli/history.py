"""`kimi-mlx history`: list, search, show, export and remove conversations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_mlx.cli.option_groups import with_option_groups
from kimi_mlx.errors import HistoryError, UsageError

if TYPE_CHECKING:
    from kimi_mlx.history.records import ConversationRecord
    from kimi_mlx.history.store import HistoryStore

ACTIONS = {"search": "WORD...", "show": "[ID]", "export": "ID [FILE]", "rm": "ID..."}
"""First words that are not words to search, with their arguments."""
DEFAULT_LIMIT = 20
NOT_ERASED = (
    "not erased: lines that you typed in a chat (Up shows them), prompt caches of --cache-dir, and backups of the disk"
)


@dataclass(frozen=True)
class HistoryCommandOptions:
    """Options of `kimi-mlx history`."""

    all: Annotated[
        bool,
        typer.Option(
            "--all",
            help="List all conversations, not only the latest; with `rm`, remove all; with `show`, show also messages "
            "that /undo and /retry removed.",
        ),
    ] = False
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, metavar="N", help="Number of conversations to list.")
    ] = DEFAULT_LIMIT
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove conversations or replace a file without asking.")] = (
        False
    )
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False


@with_option_groups
def history(
    options: HistoryCommandOptions,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WORDS]...",
            help="Words to search, all in one message or in the title; or an action: `show [ID]`, `export ID [FILE]`, "
            "`rm ID...`, `search WORD...`. ID is an id, its beginning, or a title.",
        ),
    ] = None,
) -> None:
    """List, search and show past chats.

    Without words it lists the latest conversations. `kimi-mlx chat --continue ID` continues one.
    """
    from kimi_mlx.history.store import open_history

    action, names = _split(words or [])
    with closing(open_history()) as store:
        if action == "list":
            _list(store, options)
        elif action == "search":
            _search(store, names, options)
        elif action == "show":
            _show(store, names, options)
        elif action == "export":
            _export(store, names, options)
        else:
            _remove(store, names, options)


def _split(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the action and its arguments.

    Raises:
        UsageError: the number of arguments is wrong.
    """
    if not words:
        return "list", []
    if words[0] not in ACTIONS:
        return "search", words
    action, names = words[0], words[1:]
    most = {"show": 1, "export": 2}.get(action, len(names))
    least = {"search": 1, "export": 1}.get(action, 0)
    if not least <= len(names) <= most:
        hint = (
            f"type `kimi-mlx history {action} {ACTIONS[action]}`; to find the word, `kimi-mlx history search {action}`"
        )
        raise UsageError(f"`history {action}` takes {ACTIONS[action]}, not {len(names)} arguments", hint=hint)
    return action, names


def _list(store: HistoryStore, options: HistoryCommandOptions) -> None:
    from kimi_mlx.cli.history_output import print_conversations
    from kimi_mlx.cli.output import print_json, print_note

    conversations = store.conversations()
    shown = conversations if options.all else conversations[: options.limit]
    if options.json:
        print_json([item.to_dict() for item in shown])
    elif not conversations:
        print_note("there are no conversations yet; `kimi-mlx chat` begins one")
    else:
        print_conversations(shown)
        _note_rest(len(shown), len(conversations))


def _search(store: HistoryStore, words: Sequence[str], options: HistoryCommandOptions) -> None:
    from kimi_mlx.cli.history_output import print_matches
    from kimi_mlx.cli.output import print_json, print_note
    from kimi_mlx.history.find import search

    matches = search(store, words)
    shown = matches if options.all else matches[: options.limit]
    if options.json:
        print_json(
            [
                {**match.conversation.to_dict(), "matches": match.num_messages, "snippet": match.snippet}
                for match in shown
            ]
        )
        return
    if not matches:
        print_note(f"no conversation has {' and '.join(f'`{word}`' for word in words)}")
        raise typer.Exit(1)
    print_matches(shown, words)
    _note_rest(len(shown), len(matches))


def _note_rest(num_shown: int, total: int) -> None:
    from kimi_mlx.cli.output import print_note

    if num_shown < total:
        print_note(f"the latest {num_shown} of {total}; --all lists all")


def _show(store: HistoryStore, names: Sequence[str], options: HistoryCommandOptions) -> None:
    from kimi_mlx.cli.history_output import print_conversation
    from kimi_mlx.cli.output import print_json
    from kimi_mlx.history.export import to_export
    from kimi_mlx.history.find import find_conversation

    conversation = find_conversation(store, *names)
    messages = store.messages(conversation.number, with_removed=options.all)
    if options.json:
        print_json(to_export(conversation, messages))
    else:
        print_conversation(conversation, messages)


def _export(store: HistoryStore, names: Sequence[str], options: HistoryCommandOptions) -> None:
    from kimi_mlx.cli.output import stdout
    from kimi_mlx.history.export import check_target, export_text, write_text
    from kimi_mlx.history.find import find_conversation

    conversation = find_conversation(store, names[0])
    path = Path(names[1]).expanduser() if len(names) > 1 else None
    text = export_text(conversation, store.messages(conversation.number), path)
    if path is None:
        print(text, end="")
        return
    if check_target(path) and not options.yes:
        from kimi_mlx.cli.confirm import confirm

        confirm(f"Replace {path}?", "the file is unchanged", is_quiet=options.json)
    write_text(path, text)
    stdout.print(f"wrote {path}", markup=False)


def _remove(store: HistoryStore, names: Sequence[str], options: HistoryCommandOptions) -> None:
    from kimi_mlx.cli.confirm import confirm
    from kimi_mlx.cli.history_output import print_conversations
    from kimi_mlx.cli.output import print_json, print_note, stderr, stdout
    from kimi_mlx.history.find import find_conversation
    from kimi_mlx.units import format_count

    if bool(names) == options.all:
        raise UsageError(
            "`history rm` takes ids or --all", hint="`kimi-mlx history` lists the ids; --all removes all conversations"
        )
    chosen = store.conversations() if options.all else [find_conversation(store, name) for name in names]
    conversations = list({item.number: item for item in chosen}.values())
    for item in conversations:
        if not store.acquire(item.number):
            raise HistoryError(
                f"`{item.id}` ({item.title}) is open in a chat; nothing is removed", hint="close the chat"
            )
    if not options.yes and conversations:
        print_conversations(conversations, stderr)
        confirm(f"Remove {_count(conversations)}?", "nothing is removed", is_quiet=options.json)
    store.erase([item.number for item in conversations])
    if options.json:
        print_json([item.to_dict() for item in conversations])
    else:
        stdout.print(f"removed {format_count(len(conversations), 'conversation')}")
        print_note(NOT_ERASED)


def _count(conversations: Sequence[ConversationRecord]) -> str:
    from kimi_mlx.units import format_count

    turns = sum(item.num_turns for item in conversations)
    return f"{format_count(len(conversations), 'conversation')} with {format_count(turns, 'turn')}"
