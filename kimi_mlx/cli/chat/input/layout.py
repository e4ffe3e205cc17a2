"""Layout of the line editor: the prompt with the edited text, the search line, the menu, and a line at the bottom."""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.application import get_app
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import Condition, is_done
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.layout import (
    ConditionalContainer,
    Dimension,
    Float,
    FloatContainer,
    FormattedTextControl,
    HSplit,
    Layout,
    Margin,
    VerticalAlign,
    Window,
    WindowRenderInfo,
)
from prompt_toolkit.layout.controls import UIContent
from prompt_toolkit.layout.menus import CompletionsMenu
from prompt_toolkit.layout.processors import (
    HighlightIncrementalSearchProcessor,
    HighlightSelectionProcessor,
    TabsProcessor,
)
from prompt_toolkit.styles import Style
from prompt_toolkit.widgets import SearchToolbar

from kimi_mlx.cli.chat.input.pasted_blocks import BlockProcessor, PastedBlocks
from kimi_mlx.cli.chat.input.wrapped_control import WrappedControl

PROMPT, CONTINUATION = "> ", "  "
MENU_ROWS = 8

STYLE = Style.from_dict(
    {
        "prompt": "bold ansicyan",
        "pasted": "ansicyan",
        "toolbar": "fg:ansibrightblack",
        "completion-menu": "fg:default bg:default",
        "completion-menu.completion.current": "fg:default bg:default reverse",
        "completion-menu.meta.completion": "fg:ansibrightblack bg:default",
        "completion-menu.meta.completion.current": "fg:default bg:default",
        "scrollbar.background": "bg:default",
        "scrollbar.button": "bg:default",
    }
)


class _PromptMargin(Margin):
    """The prompt before the first row, and spaces before the others."""

    def get_width(self, get_ui_content: Callable[[], UIContent]) -> int:
        return len(PROMPT)

    def create_margin(self, window_render_info: WindowRenderInfo, width: int, height: int) -> StyleAndTextTuples:
        first = window_render_info.vertical_scroll
        return [("class:prompt", PROMPT if first == 0 else CONTINUATION)]


def create_layout(buffer: Buffer, blocks: PastedBlocks, toolbar: Callable[[int], str]) -> Layout:
    """Return the layout.

    Args:
        buffer: edited text.
        blocks: pasted blocks in it.
        toolbar: function from a number of columns to the line at the bottom; empty for none.
    """
    search = SearchToolbar(ignore_case=True, forward_search_prompt="search: ", backward_search_prompt="search: ")
    control = WrappedControl(
        buffer=buffer,
        search_buffer_control=search.control,
        preview_search=True,
        include_default_input_processors=False,
        input_processors=[
            HighlightIncrementalSearchProcessor(),
            HighlightSelectionProcessor(),
            TabsProcessor(char1=" ", char2=" "),
            BlockProcessor(blocks),
        ],
    )
    text = Window(control, height=_text_height, left_margins=[_PromptMargin()], dont_extend_height=True)

    def bottom_line() -> StyleAndTextTuples:
        return [("class:toolbar", " ".join(toolbar(_columns()).split()))]

    bottom = Window(FormattedTextControl(bottom_line), height=1, dont_extend_height=True)
    menu = CompletionsMenu(max_height=MENU_ROWS, scroll_offset=1)
    is_shown = Condition(lambda: bool(toolbar(_columns()))) & ~is_done
    return Layout(
        HSplit(
            [
                FloatContainer(text, [Float(menu, xcursor=True, ycursor=True, transparent=True)]),
                ConditionalContainer(search, ~is_done),
                ConditionalContainer(bottom, is_shown),
            ],
            align=VerticalAlign.TOP,
        ),
        text,
    )


def _columns() -> int:
    """Return the width of the line at the bottom: a full one would wrap when the terminal becomes narrower."""
    return max(1, get_app().output.get_size().columns - 1)


def _text_height() -> Dimension:
    """Return the height of the edited text: half of the screen at most, so that what is above it stays readable.

    After the last key the whole message is shown, as far as the screen has room for it.
    """
    if is_done():
        return Dimension()
    app = get_app()
    most = max(1, app.output.get_size().rows // 2)
    state = app.current_buffer.complete_state
    menu = min(MENU_ROWS, len(state.completions)) + 1 if state is not None else 1  # below the row of the cursor
    return Dimension(min=min(menu, most), max=most)
