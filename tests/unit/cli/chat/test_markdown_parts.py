"""Parts of Markdown: what each looks like, markup that is not closed yet, tables, and colours of code."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_mlx.cli.chat.output.code_highlight import CodeHighlighter
from kimi_mlx.cli.chat.output.markdown_parser import close_markup
from kimi_mlx.cli.chat.output.markdown_stream import MarkdownStream
from kimi_mlx.cli.chat.output.styled_line import Line, line_width, plain_text, to_row
from tests.examples import examples


def lines_of(text: str, width: int = 60) -> list[Line]:
    stream = MarkdownStream()
    stream.feed(text)
    return stream.finish(width)


def shown(text: str, width: int = 60) -> str:
    return "\n".join(plain_text(line).rstrip() for line in lines_of(text, width))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[docs](http://a.b/c)", "docs (http://a.b/c)"),
        ("<http://a.b/c>", "http://a.b/c"),
        ("[http://good.com](http://evil.com)", "http://good.com (http://evil.com)"),
        ("[good.com](http://evil.com/good.com)", "good.com (http://evil.com/good.com)"),
        ("[a.b](https://a.b) <me@a.b>", "a.b me@a.b"),
        ("![chart](c.png)", "[image: chart] (c.png)"),
        ("[x](javascript:alert)", "[x](javascript:alert)"),
        ("a <b>bold</b> &amp; <script>", "a <b>bold</b> & <script>"),
        ("$a_1 * b_2 * c$ costs $5 or $6", "$a_1 * b_2 * c$ costs $5 or $6"),
        (r"\(a_1\) and \[b_2\]", r"\(a_1\) and \[b_2\]"),
        ("one\ntwo  \nthree", "one\ntwo\nthree"),
        ("Title\n---\ntext", "Title\n\n" + "─" * 40 + "\n\ntext"),
        ("[1]: http://a.b\n\n[1]", "[1]: http://a.b\n\n[1]"),
        ("3. a\n3. b\n\n10. c", "3. a\n4. b\n\n5. c"),
        ("- a\n  - b\n    - c\n      - d", "• a\n  ◦ b\n    ▪ c\n      ▪ d"),
        ("- [ ] a\n- [X] b\n- [y] c", "☐ a\n☑ b\n• [y] c"),
        ("> a\n> > b\n\nc", "▌ a\n▌ ▌ b\n\nc"),
        ("```py\nx\n\ny\n```", "╭─ py\nx\n\ny\n╰─"),
        ("```" + "x" * 80 + "\n```", "╭─ " + "x" * 56 + "…\n╰─"),
        ("```\nnever ended", "╭─\nnever ended\n╰─"),
        ("    code\n\n    more", "code\n\nmore"),
        ("", ""),
        ("\n\n", ""),
    ],
)
def test_parts_of_markdown(text: str, expected: str) -> None:
    assert shown(text) == expected


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("some **bo", "some **bo**"),
        ("some **bold and `co", "some **bold and `co`**"),
        ("some **", "some "),
        ("a * b", "a * b"),
        ("*it", "*it*"),
        ("~~st", "~~st~~"),
        ("`a ** b", "`a ** b`"),
        ("**done** now", "**done** now"),
        ("earlier **\nlast _line", "earlier **\nlast _line"),
        (r"escaped \*", r"escaped \*"),
        ("```", "```"),
        ("- item\n", "- item\n"),
        ("text\n\n| a | b |", "text\n\n"),
        ("| a | b |\n|--", ""),
        ("| a | b |\n|---|---|\n| 1", "| a | b |\n|---|---|\n| 1"),
    ],
)
def test_markup_that_is_not_closed_yet(text: str, closed: str) -> None:
    assert close_markup(text) == closed


CELLS = st.text(st.sampled_from("ab 漢字xy-"), max_size=30)


@settings(deadline=None)
@given(st.lists(st.lists(CELLS, min_size=1, max_size=6), min_size=1, max_size=5), st.sampled_from([12, 40, 80]))
def test_tables_fit_and_lose_nothing(rows: list[list[str]], width: int) -> None:
    columns = max(map(len, rows))
    filled = [[cell.strip() or "-" for cell in [*row, *[""] * (columns - len(row))]] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in filled]
    lines.insert(1, "|" + "---|" * columns)
    table = lines_of("\n".join(lines), width)
    assert all(line_width(line) <= width for line in table)
    text = "".join(plain_text(line) for line in table)
    for cell in filled[-1]:
        assert all(text.count(character) >= cell.count(character) for character in cell if character != " ")


def test_a_table_without_room_is_a_list_of_rows() -> None:
    table = "| Name | Number of tokens | Remark |\n|---|---|---|\n| a | 1 | verylongwordwithoutend |\n| b | 2 | y |\n"
    assert shown(table, 24) == (
        "Name: a\nNumber of tokens: 1\nRemark:\nverylongwordwithoutend\n" + "─" * 20 + "\n"
        "Name: b\nNumber of tokens: 2\nRemark: y"
    )


def style_of(line: Line, text: str) -> str:
    return next(str(segment.style) for segment in line if text in segment.text)


def test_colours_of_code_depend_on_the_lines_before() -> None:
    highlighter = CodeHighlighter("python")
    lines = [highlighter.add(line) for line in ('"""A text', "with def in it", '"""', "def f(): pass  # note")]
    assert style_of(lines[1], "def") == "green"
    assert style_of(lines[3], "def") == "magenta"
    assert style_of(lines[3], "# note") == "dim italic"


def test_a_preview_changes_nothing() -> None:
    highlighter = CodeHighlighter("python")
    highlighter.preview('"""')
    assert style_of(highlighter.add("def f(): pass"), "def") == "magenta"


@examples(50)
@given(
    st.sampled_from(["python", "js", "c", "html", "bash", "json", "diff", "yaml", "", "no-language", "\x1b[2J"]),
    st.lists(st.text(st.sampled_from("\"'`/*#<>(){}[]\\ \tab1=-+:$漢"), max_size=12), max_size=60),
)
def test_code_is_never_changed(language: str, lines: list[str]) -> None:
    highlighter = CodeHighlighter(language)
    for line in lines:
        highlighter.preview(line[: len(line) // 2])
        assert plain_text(highlighter.add(line)) == line


def test_a_row_contains_no_control_character() -> None:
    stream = MarkdownStream()
    stream.feed("&#x202e;&#x9b;2J [a](<http://x\x1b>) `\x07` \x85\n")
    text = "".join(to_row(line).text for line in stream.finish(80))
    assert not set(text) & set("\u202e\x9b\x07\x85")
    assert text.count("\x1b") == text.count("\x1b[")
