"""Files of a conversation in the terminal: attached by command, mentioned as `@path`, or dropped into a message."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.files.attachments import (
    Attachment,
    read_attachment,
    show_attachment,
    text_part,
    with_attachments,
)
from kimi_mlx.cli.chat.files.media_files import check_files, media_kind
from kimi_mlx.cli.chat.files.message_files import SplitMessage, split_message
from kimi_mlx.cli.chat.files.text_attachments import TextAttachment, read_text_attachment
from kimi_mlx.cli.chat.input.completion import complete_files, complete_media_files
from kimi_mlx.cli.chat.input.dropped_files import read_file_names, split_dropped_files
from kimi_mlx.cli.chat.input.text_editor import edit_text
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.chat.signal_handlers import ctrl_c_raises
from kimi_mlx.cli.output import print_note, stderr
from kimi_mlx.errors import UsageError
from kimi_mlx.text.media import MediaKind
from kimi_mlx.text.messages import Content
from kimi_mlx.units import is_short_number

DROP, ALL = "drop", "all"
"""Words of the argument of /files that removes files."""

ATTACHED = "attached to the next message; /files lists and drops"

TABLE_WIDTH = 64
"""Number of columns from which files are listed as a table."""


class FileCommands:
    """Files of a conversation, and the commands for them.

    Args:
        state: the conversation.
    """

    def __init__(self, state: ReplState):
        self._state = state

    def commands(self) -> Sequence[Command]:
        """Return the commands."""
        return [
            Command(
                *("/file", "FILE ...", "attach text files", self.attach_text, "Message"),
                details="So does @FILE in a message. Pasted text and piped text need no file.",
                complete=complete_files,
            ),
            Command(
                *("/image", "FILE ...", "attach images", partial(self.attach, kind="image"), "Message"),
                complete=complete_media_files,
            ),
            Command(
                *("/video", "FILE ...", "attach videos", partial(self.attach, kind="video"), "Message"),
                complete=complete_media_files,
            ),
            Command(
                *("/files", "[drop N|drop all]", "list or drop attached files", self.list, "Message"),
                details="Lists the files of the conversation and of the next message; `drop` removes some.",
                complete=lambda argument: (DROP, ALL),
                other_names=("/images",),
            ),
            Command(
                *("/edit", "[TEXT]", "write in a text editor", self._edit, "Message"),
                details="VISUAL or EDITOR names the editor. Ctrl-X Ctrl-E edits what you have typed.",
            ),
        ]

    def attach(self, argument: str, kind: MediaKind) -> None:
        """Attach files to the next message; all or none.

        Args:
            argument: file names, after the command.
            kind: kind of the files; their suffixes are ignored.

        Raises:
            UsageError: the model does not see images, no file is named, or a file does not exist or cannot be read.
            ImageError: a file is broken.
        """
        self.require_vision()
        if not argument:
            raise UsageError(f"/{kind} needs a file", hint=f"type /{kind} and a path; Tab completes it")
        paths = read_file_names(argument)
        check_files(paths)
        self._attach([self._read(path, kind) for path in paths])

    def attach_text(self, argument: str) -> None:
        """Attach text files to the next message; all or none.

        Args:
            argument: file names, after the command.

        Raises:
            UsageError: no file is named, or one cannot be read, is not text, or does not fit into the context.
        """
        if not argument:
            raise UsageError("/file needs a file", hint="type /file and a path; Tab completes it")
        self._attach(self._read_texts(read_file_names(argument, is_wanted=os.path.isfile)))

    def require_vision(self) -> None:
        """Check that the model sees images.

        Raises:
            UsageError: it does not.
        """
        if (error := self._state.conversation.model.image_error) is not None:
            raise UsageError(error.message, hint=error.hint)

    def show_attached(self) -> None:
        """Show the files for the next message, if there are any."""
        if not self._state.attached:
            return
        for file in self._state.attached:
            show_attachment(file)
        print_note(ATTACHED)

    def refuse_other_file(self, text: str) -> None:
        """Refuse a message that begins with the path of a file that is no image.

        Raises:
            UsageError: it begins with the path of a folder, or of another file.
        """
        path = next(iter(split_dropped_files(text, os.path.lexists)), None)
        if not isinstance(path, Path):
            return
        as_text = "begin the message with // to send the path as text"
        if self._state.conversation.model.image_error is not None:
            raise UsageError(f"there is no command `{path}`", hint=as_text)
        if path.is_dir():
            raise UsageError(f"`{path}` is a folder", hint=f"drop the images in it, or {as_text}")
        reason = "does not have the name of an image or a video"
        raise UsageError(f"`{path}` {reason}", hint=f"type `/file FILE` or `/image FILE`, or {as_text}")

    def read_message(self, message: UserInput) -> Content:
        """Return a message with its files: texts before it, images and videos in their places.

        If it is nothing but files, they are attached to the next message.

        Args:
            message: message as entered.

        Returns:
            The text, or parts in OpenAI's format; None if there is nothing to send yet.

        Raises:
            UsageError: a file cannot be read or does not fit, or the model does not see images that are mentioned.
            ImageError: a file is broken.
        """
        split = split_message(message)
        for word in split.missing:
            print_note(f"there is no file `{word[1:]}`: {word} is sent as text")
        parts = split.parts if self._sees(split) else [message.text]
        texts = self._read_texts(split.text_files)
        read = [part if isinstance(part, str) else self._read(part, media_kind(part) or "image") for part in parts]
        files = [*texts, *(part for part in read if isinstance(part, Attachment))]
        if files and not split.has_text:
            self._attach(files)
            return None
        for file in files:
            show_attachment(file)
        self._state.sent += files
        if not files:
            text = "".join(part for part in read if isinstance(part, str))
            return text if message.pasted else text.strip("\n")  # a pasted text stays exactly as it is
        content = [text_part(part) if isinstance(part, str) else part.part for part in read]
        return [*(file.part for file in texts), *content]

    def _sees(self, split: SplitMessage) -> bool:
        """Return whether the images and videos of a message can be sent; if not, dropped ones are sent as text.

        Raises:
            UsageError: the model does not see images, and the message mentions some, or is nothing else.
        """
        if split.media:
            try:
                self.require_vision()
            except UsageError as error:
                if split.mentioned_media or not split.has_text:
                    raise
                print_note(f"{error.message}: paths are sent as text")
                return False
        return True

    def add_attached(self, content: Content) -> Content:
        """Return a message with the attached files before its text."""
        self._state.sent += self._state.attached
        return with_attachments(content, self._state.attached)

    def finish_message(self, is_answered: bool) -> None:
        """Forget the attached files if their message was answered; else they stay for the next one."""
        if is_answered:
            self._state.attached = []
        elif self._state.attached:
            print_note("not answered: the files stay attached; /files lists and drops them")

    def list(self, argument: str) -> None:
        """Show all files, or remove some of them.

        Args:
            argument: empty, or `drop N`, or `drop all`.

        Raises:
            UsageError: another argument, or no such number.
        """
        files = self._all_files()
        if not argument:
            self._show(files)
            return
        word, _, which = argument.partition(" ")
        if word != DROP or not (which == ALL or is_short_number(which)):
            raise UsageError(f"/files does not know `{argument}`", hint="type /files, /files drop 1 or /files drop all")
        if which != ALL and not 1 <= int(which) <= len(files):
            raise UsageError(f"there is no file {which}", hint="/files lists them with their numbers")
        dropped = files if which == ALL else [files[int(which) - 1]]
        for file in dropped:
            if file in self._state.attached:
                self._state.attached.remove(file)
            else:
                self._state.conversation.remove_part(file.part)
        print_note(f"dropped {', '.join(file.name for file in dropped)}" if dropped else "there are no files")

    def _read(self, path: Path, kind: MediaKind) -> Attachment:
        try:
            with ctrl_c_raises():
                return read_attachment(path, kind, self._state.conversation.model.prepare_media)
        except KeyboardInterrupt:
            raise UsageError(f"reading `{path.name}` was stopped") from None

    def _read_texts(self, paths: Sequence[Path]) -> Sequence[TextAttachment]:
        """Read text files that fit into the context together with what is there."""
        state = self._state
        model, options = state.conversation.model, state.conversation.options
        files: list[TextAttachment] = []
        num_used = state.status.used + sum(file.num_tokens for file in state.attached)
        try:
            with ctrl_c_raises():
                for path in paths:
                    files.append(read_text_attachment(path, model, options, num_used))
                    num_used += files[-1].num_tokens
        except KeyboardInterrupt:
            raise UsageError("reading text files was stopped") from None
        return files

    def _edit(self, argument: str) -> None:
        """Let the user write a message in a text editor; it becomes the draft."""
        self._state.draft = edit_text(argument)
        if not self._state.draft:
            print_note("the editor left an empty message")

    def _attach(self, files: Sequence[Attachment | TextAttachment]) -> None:
        for file in files:
            show_attachment(file)
        self._state.attached += files
        print_note(ATTACHED)

    def _all_files(self) -> Sequence[Attachment | TextAttachment | EarlierFile]:
        """Return the files of all messages, in order, then those for the next message."""
        by_part = {id(file.part): file for file in self._state.sent}
        contents = [message.content for message in self._state.conversation.messages]
        parts = [part for content in contents if content and not isinstance(content, str) for part in content]
        sent = [by_part.get(id(part)) or EarlierFile(part) for part in parts]
        return [*(file for file in sent if file.name), *self._state.attached]

    def _show(self, files: Sequence[Attachment | TextAttachment | EarlierFile]) -> None:
        if not files:
            print_note("there are no files; /file FILE attaches a text, /image FILE an image")
            return
        states = ["attached" if file in self._state.attached else "sent" for file in files]
        if stderr.width < TABLE_WIDTH:
            for number, (file, state) in enumerate(zip(files, states, strict=True), start=1):
                stderr.print(Text(f"{number}  {file} · {state}"), soft_wrap=False)
            return
        table = Table.grid(padding=(0, 2))
        for justify in ("right", "left", "left", "right", "left"):
            table.add_column(justify=justify, overflow="fold")
        for number, (file, state) in enumerate(zip(files, states, strict=True), start=1):
            tokens = f"{file.num_tokens:,} tokens" if file.num_tokens else ""
            table.add_row(str(number), Text(file.name), file.size, tokens, state)
        stderr.print(table, soft_wrap=False)


@dataclass(frozen=True)
class EarlierFile:
    """An image or a video of a conversation that was read from a file, without its name.

    Args:
        part: part of a message in OpenAI's format.
    """

    part: Mapping[str, Any] = field(repr=False)
    size = ""
    num_tokens = 0

    @property
    def name(self) -> str:
        """Kind of the file; empty for a text."""
        return str(self.part.get("type", "")).removesuffix("_url").replace("text", "")

    def __str__(self) -> str:
        """Return the name."""
        return self.name
