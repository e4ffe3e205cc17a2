"""Images and videos of a conversation in the terminal: attached by command or dropped into a message."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.chat.attachments import Attachment, read_attachment, show_attachment, text_part, with_attachments
from kimi_mlx.cli.chat.commands import Command
from kimi_mlx.cli.chat.dropped_files import read_file_names, split_dropped_files
from kimi_mlx.cli.chat.media_files import check_files, is_media_file, media_kind
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.output import print_note, stderr
from kimi_mlx.errors import UsageError
from kimi_mlx.text.media import MediaKind
from kimi_mlx.text.messages import Content

DROP = "drop"
"""First word of the argument of /images that removes images."""

ATTACHED = "attached to the next message; /images lists and drops"

TABLE_WIDTH = 64
"""Number of columns from which images are listed as a table."""


class ReplMedia:
    """Images and videos of a conversation, and the commands for them.

    Args:
        state: the conversation.
    """

    def __init__(self, state: ReplState):
        self._state = state

    def commands(self) -> Sequence[Command]:
        """Return the commands."""
        return [
            Command("/image", "FILE ...", "attach images", partial(self.attach, kind="image"), "Message"),
            Command("/video", "FILE ...", "attach videos", partial(self.attach, kind="video"), "Message"),
            Command(
                *("/images", "[drop N|drop all]", "list or drop attached files", self.list, "Message"),
                details="Lists the images and videos of the conversation and of the next message; `drop` removes some.",
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

    def finds_files(self, text: str) -> bool:
        """Return whether an image or a video was dropped into a message."""
        return any(isinstance(part, Path) for part in split_dropped_files(text, is_media_file))

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
        raise UsageError(f"`{path}` {reason}", hint=f"type `/image FILE` if it is an image, or {as_text}")

    def read_message(self, text: str) -> Content:
        """Return a message with the files that were dropped into it, each in its place.

        If it is nothing but files, they are attached to the next message.

        Args:
            text: message as typed.

        Returns:
            The text, or parts in OpenAI's format; None if there is nothing to send yet.

        Raises:
            UsageError: a file cannot be read, or the message is only files and the model does not see images.
            ImageError: a file is broken.
        """
        parts = split_dropped_files(text, is_media_file)
        has_text = any(isinstance(part, str) for part in parts)
        if all(isinstance(part, str) for part in parts):
            return text
        try:
            self.require_vision()
        except UsageError as error:
            if not has_text:
                raise
            print_note(f"{error.message}: paths are sent as text")
            return text
        read = [part if isinstance(part, str) else self._read(part, media_kind(part) or "image") for part in parts]
        files = [part for part in read if isinstance(part, Attachment)]
        if not has_text:
            self._attach(files)
            return None
        for file in files:
            show_attachment(file)
        self._state.sent += files
        return [text_part(part) if isinstance(part, str) else part.part for part in read]

    def add_attached(self, content: Content) -> Content:
        """Return a message with the attached files before its text."""
        self._state.sent += self._state.attached
        return with_attachments(content, self._state.attached)

    def finish_message(self, is_answered: bool) -> None:
        """Forget the attached files if their message was answered; else they stay for the next one."""
        if is_answered:
            self._state.attached = []
        elif self._state.attached:
            print_note("not answered: the images stay attached; /images lists and drops them")

    def list(self, argument: str) -> None:
        """Show all images and videos, or remove some of them.

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
        if word != DROP or not (which == "all" or which.isdecimal()):
            raise UsageError(
                f"/images does not know `{argument}`", hint="type /images, /images drop 1 or /images drop all"
            )
        if which != "all" and not 1 <= int(which) <= len(files):
            raise UsageError(f"there is no image {which}", hint="/images lists them with their numbers")
        dropped = files if which == "all" else [files[int(which) - 1]]
        for file in dropped:
            if file in self._state.attached:
                self._state.attached.remove(file)
            else:
                self._state.conversation.remove_part(file.part)
        print_note(f"dropped {', '.join(file.name for file in dropped)}" if dropped else "there are no images")

    def _read(self, path: Path, kind: MediaKind) -> Attachment:
        try:
            with _ctrl_c_raises():
                return read_attachment(path, kind, self._state.conversation.model.prepare_media)
        except KeyboardInterrupt:
            raise UsageError(f"reading `{path.name}` was stopped") from None

    def _attach(self, files: Sequence[Attachment]) -> None:
        for file in files:
            show_attachment(file)
        self._state.attached += files
        print_note(ATTACHED)

    def _all_files(self) -> list[Attachment]:
        """Return the files of all messages, in order, then those for the next message."""
        by_part = {id(file.part): file for file in self._state.sent}
        return [*(by_part[id(part)] for part in self._state.conversation.media_parts), *self._state.attached]

    def _show(self, files: Sequence[Attachment]) -> None:
        if not files:
            print_note("there are no images; /image FILE attaches one")
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
            table.add_row(str(number), Text(file.name), file.size, f"{file.num_tokens} tokens", state)
        stderr.print(table, soft_wrap=False)


@contextmanager
def _ctrl_c_raises() -> Generator[None, None, None]:
    """Make Ctrl-C raise KeyboardInterrupt; between prompts it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
