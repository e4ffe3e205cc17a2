"""Pasted blocks: short texts stay, long ones are one character, and nothing of them is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.layout.controls import BufferControl
from prompt_toolkit.layout.processors import TransformationInput

from kimi_mlx.cli.chat.input.pasted_blocks import BlockProcessor, PastedBlocks, to_line_feeds
from kimi_mlx.cli.chat.input.user_input import UserInput
from tests.examples import examples

LINES = "".join(f"line {number}\n" for number in range(48))


def test_short_texts_stay_and_long_ones_become_one_character() -> None:
    blocks = PastedBlocks()
    for short in ("", "a", "two\nlines\n", "1\n2\n3\n4\n5\n", "x" * 1000):
        assert blocks.add(short) == short
    for long, label in (
        (LINES, "[pasted 48 lines]"),
        (LINES + "end", "[pasted 49 lines]"),
        ("x" * 3000 + "\n", "[pasted 3,001 characters]"),
        ("\n" * 6, "[pasted 6 lines]"),
    ):
        edited = blocks.add(long)
        assert len(edited) == 1
        assert blocks.label(edited) == label
    assert blocks.add(LINES) == blocks.add(LINES)  # once


def test_a_message_knows_its_blocks() -> None:
    blocks = PastedBlocks()
    edited = f"Why {blocks.add(LINES)}? {blocks.add('x' * 2000)}"
    message = blocks.expand(edited)
    assert message.text == f"Why {LINES}? {'x' * 2000}"
    assert [message.text[block.start : block.stop] for block in message.pasted] == [LINES, "x" * 2000]
    assert blocks.collapse(message) == edited
    assert PastedBlocks().expand(edited).text == edited  # characters of other conversations are text
    assert not message.is_pasted(3)
    assert message.is_pasted(4)


def test_a_draft_gets_its_blocks_back() -> None:
    blocks = PastedBlocks()
    other = "".join(f"other {number}\n" for number in range(9))
    edited = f"Why {blocks.add(LINES)}{blocks.add(other)}? {blocks.add(LINES)}"
    assert blocks.collapse_draft(blocks.expand(edited).text) == edited
    assert blocks.collapse_draft("Why?") == "Why?"
    long = "word " * 10_000
    assert blocks.expand(blocks.collapse_draft(long)).text == long
    assert len(blocks.collapse_draft(long)) == 1


def test_private_characters_in_a_pasted_text_are_no_blocks() -> None:
    blocks = PastedBlocks()
    block = blocks.add(LINES)
    hostile = blocks.add(f"a{block}b")
    assert blocks.expand(f"{hostile} {block}").text == f"a{block}b {LINES}"


def test_a_pasted_slash_is_no_command() -> None:
    blocks = PastedBlocks()
    assert UserInput(" /help").is_typed_command
    assert not UserInput("help /").is_typed_command
    assert not blocks.expand(blocks.add("/usr/bin:\n" * 10)).is_typed_command


@pytest.mark.slow
@examples(200)
@given(st.lists(st.tuples(st.booleans(), st.text(max_size=30)), max_size=6))
def test_blocks_survive_a_round_trip(parts: list[tuple[bool, str]]) -> None:
    blocks = PastedBlocks()
    text, ranges = "", []
    for is_pasted, part in parts:
        if is_pasted and part:
            ranges.append(range(len(text), len(text) + len(part)))
        text += part
    message = UserInput(text, tuple(ranges))
    expanded = blocks.expand(blocks.collapse(message))
    assert expanded.text == text
    assert set(ranges) <= set(expanded.pasted)  # others: texts with private characters


@pytest.mark.parametrize("text", ["a\r\nb", "a\rb", "a\nb"])
def test_line_ends_become_line_feeds(text: str) -> None:
    assert to_line_feeds(text) == "a\nb"


def test_positions_on_the_screen() -> None:
    blocks = PastedBlocks()
    edited = f"a{blocks.add(LINES)}b"
    document = Document(edited)
    control = BufferControl(Buffer(document=document))
    shown = BlockProcessor(blocks).apply_transformation(
        TransformationInput(control, document, 0, lambda i: i, [("", edited)], 80, 24)
    )
    assert "".join(text for _, text, *_ in shown.fragments) == "a[pasted 48 lines]b"
    width = len("[pasted 48 lines]")
    assert [shown.source_to_display(position) for position in range(5)] == [0, 1, 1 + width, 2 + width, 3 + width]
    assert [shown.display_to_source(position) for position in (0, 1, width, 1 + width, 9 + width)] == [0, 1, 1, 2, 3]
