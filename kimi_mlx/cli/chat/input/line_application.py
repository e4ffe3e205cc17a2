"""The application of prompt_toolkit, for terminals that wrap their rows again when they become narrower."""

from __future__ import annotations

from prompt_toolkit.application import Application
from prompt_toolkit.layout.screen import Screen

from kimi_mlx.cli.chat.output.live_region import wraps_again


class LineApplication(Application[str]):
    """A line editor. When the size changes, it erases the rows that it has drawn, as the terminal has wrapped them."""

    def _on_resize(self) -> None:
        screen = self.renderer.last_rendered_screen
        if screen is not None and wraps_again():
            columns = self.output.get_size().columns
            cursor = screen.get_cursor_position(self.layout.current_window)
            widths = [_row_width(screen, row) for row in range(cursor.y)]
            self.output.cursor_up(sum((width - 1) // columns for width in widths if width) + cursor.x // columns)
        super()._on_resize()


def _row_width(screen: Screen, row: int) -> int:
    """Return the number of columns of a row that were written."""
    cells = screen.data_buffer[row].items()
    return max((column + cell.width for column, cell in cells if cell.char != " "), default=0)
