"""Formulas as MathML."""

from __future__ import annotations

import re
from contextlib import suppress
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.server.page.mathml import SYMBOLS, UnknownTexError, to_mathml

NUM_ARGUMENTS = {
    **dict.fromkeys(["mfrac", "mroot", "msup", "msub", "mover", "munder"], 2),
    **dict.fromkeys(["msubsup", "munderover"], 3),
}
COMMANDS = sorted({name for kind in SYMBOLS.values() for name in kind if name.rstrip("*").isalpha()})
TEX = st.lists(
    st.one_of(
        st.sampled_from([rf"\{name} " for name in COMMANDS]),
        st.sampled_from(
            [*"{}^_&'~$#%[]()<>|x1 ", "{a}", r"\\", r"\,", r"\frac", r"\sqrt", r"\left", r"\right", r"\begin{cases}"]
        ),
        st.sampled_from([r"\end{cases}", r"\boxed", r"\not", r"\tag", "</math>", "<script>", "é"]),
    ),
    max_size=25,
).map("".join)


def tree_of(tex: str) -> ElementTree.Element:
    return ElementTree.fromstring(to_mathml(tex, is_display=True).replace("&nbsp;", "\N{NO-BREAK SPACE}"))


@given(TEX)
def test_what_is_translated_is_well_formed(tex: str) -> None:
    with suppress(UnknownTexError):
        for node in tree_of(tex).iter():
            assert len(node) == NUM_ARGUMENTS.get(node.tag, len(node)), node.tag


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        (r"x^{2} + y_i", "x2+yi"),
        (r"\frac12 \times 10^{-3}", "12\u00d710\u22123"),
        (r"\sum_{i=1}^n i \le \infty", "∑i=1ni≤∞"),
        (r"\mathbb{R}, \mathbf{a1}", "\u211d,\U0001d41a\U0001d7cf"),
        (r"\left( \sqrt[3]{x} \right]", "(x3]"),
        (r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}", "(abcd)"),
        (r"\boxed{\text{50\% of it}}", "50%\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}it"),
    ],
)
def test_formulas(tex: str, text: str) -> None:
    assert "".join(tree_of(tex).itertext()) == text


@pytest.mark.parametrize(
    "tex", [r"\unknown", "x^", "{", "}", "a & b", r"\left(", r"\begin{x}y\end{x}", "x^1^2", "{" * 500, r"\frac" * 500]
)
def test_other_formulas_are_refused(tex: str) -> None:
    with pytest.raises(UnknownTexError):
        to_mathml(tex, is_display=False)


def test_text_is_escaped() -> None:
    html = to_mathml(r"\text{<script>} < \operatorname{&}", is_display=False)
    assert set(re.findall(r"</?(\w+)", html)) <= {"math", "mrow", "mtext", "mo"}
    assert "&lt;script&gt;" in html
