"""Grammar rules for answers that are not JSON."""

from __future__ import annotations

import contextlib
import json
import re
import time

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import GrammarError
from kimi_mlx.text.grammar import Thinking, build_grammar
from kimi_mlx.text.json_schema import find_problem
from kimi_mlx.text.lark_rules import choice_rule, grammar_rule, regex_rule


def accepts(rule: str, text: str) -> bool:
    """Return whether the grammar of an answer with this rule accepts a text as a whole."""
    grammar = build_grammar({}, Thinking.NONE, response_rule=rule)
    assert grammar is not None
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, json.loads(grammar)["response"], log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


@given(choices=st.lists(st.text(max_size=8), min_size=1, max_size=4), other=st.text(max_size=8))
def test_choices(choices: list[str], other: str) -> None:
    rule = choice_rule(choices, "choice")
    for text in (*choices, other):
        try:
            text.encode()
        except UnicodeEncodeError:
            continue
        assert accepts(rule, text) == (text in choices)


@pytest.mark.parametrize(
    ("pattern", "texts", "others"),
    [
        (r"[a-c]{2}/x", ["ab/x"], ["ab", "dd/x", "ab/xx"]),
        (r"a\/b", ["a/b"], ["a\\/b"]),
        (r"(yes|no)\n?", ["yes", "no\n"], ["maybe"]),
        ("a\nb", ["a\nb"], ["a b"]),
        (r"\\/", ["\\/"], ["/"]),
    ],
)
def test_regular_expressions(pattern: str, texts: list[str], others: list[str]) -> None:
    for text in texts:
        assert re.fullmatch(pattern, text)
        assert accepts(regex_rule(pattern), text)
    assert not any(accepts(regex_rule(pattern), text) for text in others)


GBNF = """
root ::= "f(" number ("," ws number)* ")"   # a call
number ::= [0-9]+ | "-" [0-9]+
ws ::= [ \\t]*
"""
LARK = 'start: "{" word "}" | /[0-9]+/\nword: /[a-z]+/'


def test_grammars_of_clients() -> None:
    rule = grammar_rule(GBNF, "grammar")
    assert accepts(rule, "f(1, -22,3)")
    assert not accepts(rule, "f()")
    rule = grammar_rule(LARK, "grammar")
    assert accepts(rule, "{abc}")
    assert accepts(rule, "42")
    assert not accepts(rule, "{}")


@pytest.mark.parametrize("grammar", ["root ::= (", "root ::= x", "start: x", "", 'start: "a', "::=", "root ::= [", "}"])
def test_broken_grammars_are_refused(grammar: str) -> None:
    with pytest.raises(GrammarError, match=r"^`grammar`"):
        build_grammar({}, Thinking.NONE, response_rule=grammar_rule(grammar, "grammar"), schema_name="grammar")


@pytest.mark.parametrize("pattern", ["(", "[", "a{2", "\\", "(?=a)b", "a{1,100000000}", "(" * 5_000])
def test_broken_regular_expressions_are_refused_or_enforced(pattern: str) -> None:
    started = time.process_time()
    find_problem(f"start: {regex_rule(pattern)}")
    assert time.process_time() - started < 5


@given(st.text(alphabet='root:= "[]()|*+{}\\\n#ax/%<>-09', max_size=60))
def test_any_text_is_a_grammar_or_is_refused(text: str) -> None:
    find_problem(f"start: {regex_rule(text)}")
    with contextlib.suppress(GrammarError):
        find_problem(f"start: {grammar_rule(text, 'grammar')}")


def test_too_many_choices_are_refused() -> None:
    for choices in ([], ["x"] * 1_001):
        with pytest.raises(GrammarError, match="`choice` has"):
            choice_rule(choices, "choice")
