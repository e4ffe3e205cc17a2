"""Colours of code, line by line as it arrives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name  # pyright: ignore[reportUnknownVariableType]
from pygments.token import Comment, Error, Generic, Keyword, Literal, Name, Number, Operator, String, Token
from pygments.util import ClassNotFound
from rich.segment import Segment
from rich.style import Style
from rich.syntax import ANSISyntaxTheme

from kimi_mlx.cli.chat.output.styled_line import Line, line_of, plain_text, split_lines

if TYPE_CHECKING:
    from pygments.token import _TokenType  # pyright: ignore[reportPrivateUsage]

THEME = ANSISyntaxTheme(
    {
        Token: Style(),
        Comment: Style(dim=True, italic=True),
        Comment.Preproc: Style(color="magenta"),
        Keyword: Style(color="magenta"),
        Keyword.Constant: Style(color="cyan"),
        Keyword.Type: Style(color="cyan"),
        Operator.Word: Style(color="magenta"),
        Name.Builtin: Style(color="cyan"),
        Name.Class: Style(color="bright_blue", bold=True),
        Name.Decorator: Style(color="bright_blue"),
        Name.Function: Style(color="bright_blue"),
        Name.Tag: Style(color="bright_blue"),
        Number: Style(color="cyan"),
        Literal: Style(color="cyan"),
        String: Style(color="green"),
        Generic.Heading: Style(bold=True),
        Generic.Subheading: Style(bold=True),
        Generic.Deleted: Style(color="red"),
        Generic.Inserted: Style(color="green"),
        Generic.Prompt: Style(dim=True),
        Error: Style(),
    }
)
"""Colours by name, which a terminal adapts to its background; no black, white, yellow and no backgrounds."""

MAX_LINE = 500
"""Number of characters from which a line has no colours."""
MIN_CONTEXT, MAX_CONTEXT = 24, 200
"""Number of lines before a line that its colours depend on: from MIN_CONTEXT on they are dropped where no string or
comment is open, at MAX_CONTEXT anyway."""


class CodeHighlighter:
    """Gives lines of code their colours, each by the lines before it only.

    Args:
        language: name of the language, as in a fence of Markdown; an unknown one has no colours.
    """

    def __init__(self, language: str):
        self._lexer = _find_lexer(language)
        self._context: list[str] = []

    def copy(self) -> CodeHighlighter:
        """Return another one in the same state."""
        other = CodeHighlighter("")
        other._lexer, other._context = self._lexer, [*self._context]
        return other

    def add(self, line: str) -> Line:
        """Return the next line with its colours."""
        if self._lexer is None or len(line) > MAX_LINE:
            return line_of(line)
        self._context.append(line)
        tokens = list(self._lexer.get_tokens("\n".join(self._context) + "\n"))
        highlighted = _last_line(tokens, line)
        if len(self._context) >= MAX_CONTEXT or (len(self._context) >= MIN_CONTEXT and _is_between(tokens)):
            self._context = []
        return highlighted

    def preview(self, line: str) -> Line:
        """Return an unfinished line with its colours; the next line is independent of it."""
        context = list(self._context)
        highlighted = self.add(line)
        self._context = context
        return highlighted


def _find_lexer(language: str) -> Lexer | None:
    try:
        return get_lexer_by_name(language, stripnl=False) if language else None
    except ClassNotFound:
        return None


def _last_line(tokens: Sequence[tuple[_TokenType, str]], line: str) -> Line:
    """Return the last line of the tokens; without colours if the lexer changed its text."""
    needed = len(line) + 1
    parts: list[Segment] = []
    for kind, text in reversed(tokens):
        parts.append(Segment(text, THEME.get_style_for_token(kind)))
        needed -= len(text)
        if needed < 0:
            break
    lines = split_lines(reversed(parts))
    last = lines[-2] if len(lines) > 1 else []
    return last if plain_text(last) == line else line_of(line)


def _is_between(tokens: Sequence[tuple[_TokenType, str]]) -> bool:
    """Return whether no string, comment or error is open behind the last line."""
    kind = next((kind for kind, text in reversed(tokens) if text.strip()), Token)
    return kind in Comment.Single or not (kind in String or kind in Comment or kind in Error)
