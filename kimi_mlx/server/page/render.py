"""Markdown to HTML for the web page, block by block.

All tags are written by markdown-it-py, Pygments and mathml.py; none comes from the text. HTML in the text is
shown as text, images become links, and only links with the schemes of SAFE_LINK stay links. So the text of a model
cannot run a script, load a resource, or restyle the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name  # pyright: ignore[reportUnknownVariableType]
from pygments.util import ClassNotFound

from kimi_mlx.server.page.formulas import add_formulas, formula_html

MAX_HIGHLIGHTED_CHARS = 60_000
"""Maximum length of highlighted code; longer code is plain, because a lexer may take seconds for it."""

LANGUAGE = re.compile(r"[\w+#.-]{1,30}")

SAFE_LINK = re.compile(r"(?:https?://|mailto:)", re.IGNORECASE)
"""Beginning of the links that stay links; all others are shown as text."""

LANGUAGES = {
    *("bash", "c", "c++", "cmake", "console", "cpp", "csharp", "cs", "css", "dart", "diff"),
    *("dockerfile", "elixir", "erlang", "fish", "fortran", "go", "graphql", "haskell", "html", "ini"),
    *("java", "javascript", "js", "json", "jsx", "julia", "kotlin", "latex", "lisp", "lua", "make"),
    *("makefile", "markdown", "md", "matlab", "nginx", "objective-c", "objc", "ocaml", "perl", "php"),
    *("powershell", "prolog", "protobuf", "python", "py", "python3", "pycon", "r", "ruby", "rb", "rust"),
    *("rs", "scala", "scheme", "scss", "sh", "shell", "sql", "svg", "swift", "tcl", "tex", "toml", "ts"),
    *("tsx", "typescript", "vim", "xml", "yaml", "yml", "zig", "zsh"),
}
"""Names of the languages that are highlighted, as in Pygments."""


@dataclass(frozen=True)
class Block:
    """A block of Markdown at the top level, such as a paragraph, list, table or code block.

    Args:
        html: its HTML.
        end: end of its source in the text, in UTF-16 code units, as JavaScript counts.
        is_finished: whether appended text cannot change it.
    """

    html: str
    end: int
    is_finished: bool


def render_blocks(text: str, *, is_final: bool) -> list[Block]:
    """Return the blocks of a Markdown text in order.

    Args:
        text: Markdown, from the beginning of a block.
        is_final: whether no text will be appended.
    """
    ends = _line_ends(text)
    num_finished = 0 if is_final else _num_finished(text)
    blocks: list[Block] = []
    for number, tokens in enumerate(_top_level(_parser().parse(text))):
        stop = tokens[0].map[1] if tokens[0].map else len(ends)
        html = _parser().renderer.render(tokens, _parser().options, {})
        blocks.append(Block(html, ends[min(stop, len(ends)) - 1], is_final or number < num_finished))
    return blocks


def _line_ends(text: str) -> list[int]:
    """Return the end of each line in UTF-16 code units, as markdown-it counts lines."""
    ends: list[int] = []
    position = 0
    for line in re.split(r"(?<=\n)|(?<=\r)(?!\n)", text):
        position += len(line) + sum(character > "\uffff" for character in line)
        ends.append(position)
    return ends


def _num_finished(text: str) -> int:
    """Return the number of blocks that appended text cannot change.

    The last line may be unfinished: a line that looks like a heading or a fence may still become part of the paragraph
    before it. So blocks are counted without it, and text may still be appended to the last of them.
    """
    complete = text[: max(text.rfind("\n"), text.rfind("\r")) + 1]
    return max(len(_top_level(_parser().parse(complete))) - 1, 0)


def _top_level(tokens: Sequence[Token]) -> list[list[Token]]:
    """Return the tokens of each block at the top level."""
    blocks: list[list[Token]] = []
    depth = 0
    for token in tokens:
        if depth == 0:
            blocks.append([])
        blocks[-1].append(token)
        depth += token.nesting
    return blocks


class _PageRenderer(RendererHTML):
    """Writes HTML without inline styles, and links instead of images."""

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        token = tokens[idx]
        label = self.renderInlineAsText(token.children or [], options, env) or "image"
        url = str(token.attrs.get("src", ""))
        if not SAFE_LINK.match(url):
            return escapeHtml(label)
        return f'<a href="{escapeHtml(url)}" {LINK_ATTRIBUTES}>{escapeHtml(label)}</a>'

    def link_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return f'<a href="{escapeHtml(str(tokens[idx].attrs.get("href", "")))}" {LINK_ATTRIBUTES}>'

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        token = tokens[idx]
        language = LANGUAGE.match(token.info.strip())
        return _code_html(token.content, language.group() if language else "")

    def code_block(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return _code_html(tokens[idx].content, "")

    def th_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return _cell_html(tokens[idx])

    def td_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return _cell_html(tokens[idx])

    def formula(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return formula_html(tokens[idx])

    def formula_block(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        return formula_html(tokens[idx]) + "\n"

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return '<div class="table" tabindex="0"><table>\n'

    def table_close(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        return "</table></div>\n"


ADDRESS = re.compile(r"\bhttps?://[^\s<>\"'`\u2018-\u201d\u3000-\u303f\uff00-\uff60]+", re.IGNORECASE)
"""A web address in a text."""


def _link_addresses(state: StateCore) -> None:
    """Turn web addresses in texts into links."""
    for inline in state.tokens:
        children: list[Token] = []
        depth = 0
        for token in inline.children or ():
            depth += token.nesting if token.type in ("link_open", "link_close") else 0
            children += [token] if depth or token.type != "text" else _split_addresses(token)
        if inline.type == "inline":
            inline.children = children


def _split_addresses(token: Token) -> Iterator[Token]:
    position = 0
    for match in ADDRESS.finditer(token.content):
        address = match.group().rstrip(".,;:!?*_~")
        while address.endswith(")") and address.count(")") > address.count("("):
            address = address[:-1].rstrip(".,;:!?*_~")
        yield Token("text", "", 0, content=token.content[position : match.start()])
        yield Token("link_open", "a", 1, attrs={"href": address})
        yield Token("text", "", 0, content=address)
        yield Token("link_close", "a", -1)
        position = match.start() + len(address)
    yield Token("text", "", 0, content=token.content[position:])


TASK = re.compile(r"\[([ xX])\] ")


def _show_tasks(state: StateCore) -> None:
    """Show `[ ]` and `[x]` at the beginning of a list item as boxes."""
    for item, inline in zip(state.tokens, state.tokens[2:], strict=False):
        if item.type != "list_item_open" or not inline.children or inline.children[0].type != "text":
            continue
        first = inline.children[0]
        if match := TASK.match(first.content):
            first.content = f"{'☐' if match[1] == ' ' else '☑'} {first.content[match.end() :]}"


LINK_ATTRIBUTES = 'target="_blank" rel="noopener noreferrer nofollow"'


def _cell_html(token: Token) -> str:
    style = str(token.attrs.get("style", ""))
    alignment = style.rpartition(":")[2]
    return f'<{token.tag} class="{alignment}">' if alignment in ("left", "right", "center") else f"<{token.tag}>"


def _code_html(code: str, language: str) -> str:
    lexer = _lexer(language.lower()) if len(code) <= MAX_HIGHLIGHTED_CHARS else None
    body = escapeHtml(code) if lexer is None else highlight(code, lexer, _FORMATTER)
    return f'<div class="code" data-language="{escapeHtml(language)}"><pre><code>{body}</code></pre></div>\n'


_FORMATTER: HtmlFormatter[str] = HtmlFormatter(nowrap=True)


@lru_cache(maxsize=64)
def _lexer(language: str) -> Lexer | None:
    if language not in LANGUAGES:
        return None
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_PageRenderer)
    parser.enable(["table", "strikethrough"])
    add_formulas(parser)
    parser.core.ruler.after("inline", "plain_links", _link_addresses)
    parser.core.ruler.after("inline", "tasks", _show_tasks)
    parser.validateLink = lambda url: SAFE_LINK.match(url) is not None  # type: ignore[method-assign]
    return parser
