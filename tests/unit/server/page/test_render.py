"""Markdown for the page: its HTML holds formatted text only, and finished blocks never change."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kimi_mlx.server.page.render import render_blocks

TAGS = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "br", "strong", "em", "s", "a"),
    *("code", "pre", "div", "span", "table", "thead", "tbody", "tr", "th", "td"),
    *("math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "msup", "msub", "msubsup", "mover", "munder", "munderover"),
    *("mfrac", "msqrt", "mroot", "mtable", "mtr", "mtd"),
}
ATTRIBUTES = {
    *("href", "target", "rel", "class", "data-language", "start", "tabindex"),
    *("display", "stretchy", "fence", "movablelimits", "accent", "accentunder", "linethickness", "width"),
}

PIECES = [
    *("word ", "\n", "\n\n", "# ", "## h\n", "- ", "1. ", "> ", "```", "```python\n", "~~~\n", "    ", "\t", "---\n"),
    *("| a | b |\n", "|---|:-:|\n", "*", "**", "_", "~~", "`", "[", "](", ")", "![", "<", ">", "<b>", "<script>"),
    *("<img src=x onerror=1>", "javascript:a()", 'https://example.org/?a=1&b="2"', "data:text/html,x", "&lt;"),
    *("&colon;", "JaVaScRiPt&#58;", "\\", "'", '"', "[x]: vbscript:y\n", "<style>", "<!--", "é", "😀", "\r\n", "\0"),
    *("def f(): return 1\n", "[a](//evil.example)", "[a](mailto:x@y.z)", "<https://a.b>", "[x]", "]", "html\n", "==="),
    *(
        "$",
        "$$",
        "$$\n",
        "\\[\n",
        "\\]\n",
        "\\(",
        "\\)",
        "x^2",
        "\\frac{a}{b}",
        "\\text{",
        "}",
        "- [ ] ",
        "&",
        "https://a.b/(c)",
    ),
]
MARKDOWN = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


class _Checker(HTMLParser):
    """Checks tags and attributes as a browser would read them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        assert {name for name, _ in attrs} <= ATTRIBUTES
        for name, value in attrs:
            if name == "href":
                assert (value or "").lower().startswith(("http://", "https://", "mailto:"))
                assert dict(attrs)["rel"] == "noopener noreferrer nofollow"
        if tag not in ("br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_decl(self, decl: str) -> None:
        self.handle_comment(decl)

    handle_pi = unknown_decl = handle_comment


def check(html: str) -> None:
    """Check that HTML holds nothing but formatted text."""
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []


def html_of(text: str) -> str:
    return "".join(block.html for block in render_blocks(text, is_final=True))


@given(MARKDOWN)
def test_html_holds_formatted_text_only(text: str) -> None:
    for block in render_blocks(text, is_final=True):
        check(block.html)


@given(st.text())
def test_any_text_is_rendered(text: str) -> None:
    check(html_of(text))


@given(MARKDOWN, st.data())
def test_finished_blocks_do_not_change(text: str, data: st.DataObject) -> None:
    assume("]: " not in text)  # only the definition of a link changes blocks before it
    cut = data.draw(st.integers(0, len(text)))
    finished = [block for block in render_blocks(text[:cut], is_final=False) if block.is_finished]
    whole = render_blocks(text, is_final=True)[: len(finished)]
    assert [(block.html, block.end) for block in finished] == [(block.html, block.end) for block in whole]


@given(MARKDOWN)
def test_rendering_continues_after_the_finished_blocks(text: str) -> None:
    assume("]: " not in text)
    blocks = render_blocks(text, is_final=False)
    end = max((block.end for block in blocks if block.is_finished), default=0)
    rest = text.encode("utf-16-le")[2 * end :].decode("utf-16-le")
    whole = [block.html for block in blocks if block.is_finished]
    whole += [block.html for block in render_blocks(rest, is_final=True)]
    assert whole == [block.html for block in render_blocks(text, is_final=True)]


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("# Title", "<h1>Title</h1>\n"),
        ("~~gone~~ `x < y`", "<p><s>gone</s> <code>x &lt; y</code></p>\n"),
        ("![a cat](https://x.example/cat.png)", 'rel="noopener noreferrer nofollow">a cat</a></p>\n'),
        ("![a cat](data:image/png;base64,AA)", "<p>![a cat](data:image/png;base64,AA)</p>\n"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>\n"),
        ("|a|\n|-:|\n|1|", '<td class="right">1</td>'),
        ("```python\nif x: pass\n```", '<span class="k">if</span>'),
        ('```"><script>\nx\n```', '<div class="code" data-language=""><pre><code>x\n</code></pre></div>\n'),
        ("5. five", '<ol start="5">'),
        ("- [ ] a\n- [x] b", "<li>\N{BALLOT BOX} a</li>\n<li>\N{BALLOT BOX WITH CHECK} b</li>"),
        ("(https://a.b/c_(d).)", '(<a href="https://a.b/c_(d)" '),
        ("`https://a.b`", "<p><code>https://a.b</code></p>"),
        ("$a_1*b*c$", "<p><math><mrow><msub><mi>a</mi><mn>1</mn></msub>"),
        (r"so \(a\)", "<p>so <math><mi>a</mi></math></p>"),
        ("so\n\\[\na\n- b\n\\]\nis", '<p>so</p>\n<div class="formula" tabindex="0"><math display="block"><mrow>'),
        (r"$$\unknown < 1$$", r'<div class="formula" tabindex="0"><code>$$\unknown &lt; 1$$</code></div>'),
        ("$5 and $10, US$5-$6, $$", "<p>$5 and $10, US$5-$6, $$</p>"),
        ("$$\n\n# b", "<h1>b</h1>"),
    ],
)
def test_html_of_markdown(markdown: str, html: str) -> None:
    assert html in html_of(markdown)


def test_ends_count_utf16_units() -> None:
    blocks = render_blocks("😀😀\r\n\r\nb\n\n", is_final=True)
    assert [block.end for block in blocks] == [6, 10]
