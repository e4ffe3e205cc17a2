# ruff: noqa: RUF001
"""Markdown while it arrives: the same lines wherever the text is cut, and nothing final changes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cli.chat.output.markdown_stream import MarkdownStream
from kimi_mlx.cli.chat.output.styled_line import Line, line_width, plain_text, to_row
from tests.examples import examples

ALL_KINDS = """\
# Title with `code`

A **bold** and *italic* and ~~struck~~ [link](http://a.b/c) to $x_1 * y_2 * z$, <b>HTML</b>.
Second line.

1. first
   - nested
   - another

     ```python
     def f(x):
         return x
     ```

2. second

   paragraph
- [ ] open
- [x] done

> quote
>
> - list in it

| Name | Value |
|:-----|------:|
| a | 1 |
| 漢字 | 22 |

```js
const x = 1;

// end
```

$$
x_1 * y_2
$$

---
这是一段中文，没有空格。
"""
MARKS = [
    "```",
    "~~~",
    "|",
    "---",
    "===",
    "**",
    "_",
    "`",
    "[",
    "](",
    "<",
    "&#27;",
    "$$",
    "\\[",
    "\\]",
    "\\",
    "#",
    "[ ] ",
]
SPACES = ["\n", "\n\n", "\n  ", "\n    ", "\t", "   ", "- ", "\n* ", "\n1. ", "> ", "  - ", "x", "漢", "👩‍🚀"]
PARTS = st.sampled_from([*ALL_KINDS.split(" "), *MARKS, *SPACES])
TEXTS = st.one_of(
    st.lists(PARTS, max_size=40).map("".join),
    st.lists(st.sampled_from(ALL_KINDS.split("\n\n")), max_size=6).map("\n\n".join),
    st.lists(st.sampled_from(ALL_KINDS.split("\n")), max_size=16).map("\n".join),
)


def rendered(text: str, width: int = 40) -> list[str]:
    stream = MarkdownStream()
    stream.feed(text)
    return texts(stream.finish(width))


def texts(lines: list[Line]) -> list[str]:
    return [plain_text(line).rstrip() for line in lines]


@examples(100)
@given(TEXTS, st.lists(st.integers(0, 600), max_size=12), st.sampled_from([5, 12, 40, 80]))
def test_lines_are_the_same_wherever_the_text_is_cut(text: str, cuts: list[int], width: int) -> None:
    whole, streamed = MarkdownStream(), MarkdownStream()
    whole.feed(text)
    expected = [to_row(line) for line in whole.finish(width)]
    lines: list[Line] = []
    for start, end in itertools.pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        streamed.feed(text[start:end])
        lines += streamed.take(width)
        streamed.tail(width)
    lines += streamed.finish(width)
    assert [to_row(line) for line in lines] == expected
    assert all(line_width(line) <= width for line in lines)


@examples(25)
@given(TEXTS)
def test_lines_are_the_same_when_characters_arrive_alone(text: str) -> None:
    stream, lines = MarkdownStream(), []
    for character in text:
        stream.feed(character)
        lines += stream.take(40)
        stream.tail(40)
    assert texts(lines + stream.finish(40)) == rendered(text)
