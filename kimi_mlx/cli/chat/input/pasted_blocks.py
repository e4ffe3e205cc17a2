"""Pasted blocks: long pasted texts that the line editor shows as `[pasted 48 lines]`.

Each block is one character of the edited text, so that keys move over it and delete it as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.layout.utils import explode_text_fragments

from kimi_mlx.cli.chat.input.user_input import UserInput

MAX_LINES = 5
"""Maximum number of lines of a pasted text that is shown as it is."""

MAX_CHARACTERS = 1000
"""Maximum length of a pasted text that is shown as it is."""

MAX_SHOWN = 10_000
"""Maximum length of a draft or of an earlier message that is shown as it is: a longer one becomes a block."""

FIRST, LAST = "\U000f0000", "\U000ffffd"
"""Private characters of Unicode, one for each block."""

_PRIVATE = re.compile(f"[{FIRST}-{LAST}]")


class PastedBlocks:
    """The blocks of one conversation."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._characters: dict[str, str] = {}

    def add(self, text: str, max_characters: int = MAX_CHARACTERS, max_lines: int | None = MAX_LINES) -> str:
        """Return what stands for a pasted text in the edited text: a block, or a short text itself.

        Args:
            text: pasted text, with line feeds as line ends.
            max_characters: maximum length of a short text.
            max_lines: maximum number of lines of a short text; None for no limit.
        """
        has_many_lines = max_lines is not None and text.count("\n", 0, -1) >= max_lines
        # a private character could be mistaken for a block
        is_short = len(text) <= max_characters and not has_many_lines and not _PRIVATE.search(text)
        return text if is_short else self._add_block(text)

    def collapse(self, message: UserInput) -> str:
        """Return the edited text of a message with its blocks."""
        parts: list[str] = []
        position = 0
        for block in message.pasted:
            parts += [
                self.add(message.text[position : block.start], MAX_SHOWN, None),
                self._add_block(message.text[block.start : block.stop]),
            ]
            position = block.stop
        return "".join([*parts, self.add(message.text[position:], MAX_SHOWN, None)])

    def collapse_draft(self, text: str) -> str:
        """Return the edited text of a draft: texts that were pasted before become blocks again."""
        found: list[range] = []
        for pasted in sorted(self._characters, key=len, reverse=True):
            start = text.find(pasted)
            while start >= 0:
                end = start + len(pasted)
                if not any(block.start < end and start < block.stop for block in found):
                    found.append(range(start, end))
                start = text.find(pasted, end)
        return self.collapse(UserInput(text, tuple(sorted(found, key=lambda block: block.start))))

    def expand(self, edited: str) -> UserInput:
        """Return the message of an edited text."""
        parts: list[str] = []
        blocks: list[range] = []
        position = length = 0
        for found in _PRIVATE.finditer(edited):
            if (text := self._texts.get(found.group())) is not None:
                parts += [edited[position : found.start()], text]
                start = length + found.start() - position
                length, position = start + len(text), found.end()
                blocks.append(range(start, length))
        return UserInput("".join([*parts, edited[position:]]), tuple(blocks))

    def label(self, character: str) -> str | None:
        """Return what is shown for a character of the edited text; None if it is no block."""
        text = self._texts.get(character)
        if text is None:
            return None
        num_lines = text.count("\n", 0, -1) + 1
        size = f"{num_lines:,} lines" if num_lines > 1 else f"{len(text):,} characters"
        return f"[pasted {size}]"

    def _add_block(self, text: str) -> str:
        if text not in self._characters:
            # at the last character the oldest block would have to go: nobody pastes 65,533 blocks
            character = chr(min(ord(FIRST) + len(self._texts), ord(LAST)))
            self._characters[text] = character
            self._texts[character] = text
        return self._characters[text]


class BlockProcessor(Processor):
    """Shows the label of each block in place of its character."""

    def __init__(self, blocks: PastedBlocks):
        self._blocks = blocks

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        """Replace the characters of blocks in a line."""
        if not _PRIVATE.search(transformation_input.document.lines[transformation_input.lineno]):
            return Transformation(transformation_input.fragments)
        shown: StyleAndTextTuples = []
        widths: list[int] = []
        for style, character, *_ in explode_text_fragments(transformation_input.fragments):
            label = self._blocks.label(character)
            shown.append((style, character) if label is None else (f"{style} class:pasted", label))
            widths.append(1 if label is None else len(label))
        starts = _starts(widths)

        def to_display(position: int) -> int:
            return starts[min(position, len(widths))] + max(0, position - len(widths))

        def to_source(position: int) -> int:
            return max(number for number, start in enumerate(starts) if start <= position)

        return Transformation(shown, to_display, to_source)


def to_line_feeds(text: str) -> str:
    """Return a pasted text with line feeds as line ends: terminals send carriage returns."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _starts(widths: Iterable[int]) -> list[int]:
    starts = [0]
    for width in widths:
        starts.append(starts[-1] + width)
    return starts
