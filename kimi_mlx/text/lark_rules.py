"""Grammar rules in Lark for answers that are not JSON: a choice of texts, a regular expression, or a client's grammar.

Each is the body of a rule in llguidance's dialect of Lark. `build_grammar` checks it and makes it part of an answer's
grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from llguidance.gbnf_to_lark import any_to_lark

from kimi_mlx.errors import GrammarError

MAX_CHOICES = 1_000
"""Maximum number of texts of a choice."""

MAX_CHARS = 200_000
"""Maximum number of characters of a rule."""

UNESCAPED_SLASH = re.compile(r"(\\.)|/", re.DOTALL)
"""A slash of a regular expression, or an escaped character in group 1."""


def choice_rule(choices: Sequence[str], where: str) -> str:
    """Return the rule of an answer that is one of several texts.

    Args:
        choices: texts.
        where: name of the choice in error messages.

    Raises:
        GrammarError: there are no texts, or too many.
    """
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise GrammarError(f"`{where}` has {len(choices)} items, but 1 to {MAX_CHOICES} are allowed")
    texts = [json.dumps(choice, ensure_ascii=False) for choice in choices]
    return " | ".join(text.replace("\x7f", r"\u007f") for text in texts)  # llguidance takes no plain DEL


def regex_rule(pattern: str) -> str:
    """Return the rule of an answer that a regular expression matches as a whole."""
    escaped = UNESCAPED_SLASH.sub(lambda match: match[1] or r"\/", pattern)
    return f"/{escaped}/".replace("\n", r"\n")


def grammar_rule(grammar: str, where: str) -> str:
    """Return the rule of an answer that matches a grammar.

    Args:
        grammar: grammar in GBNF, whose rules have `::=`, or in llguidance's dialect of Lark.
        where: name of the grammar in error messages.

    Raises:
        GrammarError: the grammar is too long, or is not valid GBNF.
    """
    if len(grammar) > MAX_CHARS:
        raise GrammarError(f"`{where}` has {len(grammar)} characters, but at most {MAX_CHARS} are allowed")
    try:
        lark = any_to_lark(grammar)
    except RecursionError as error:
        raise GrammarError(f"`{where}` is nested too deeply", hint="simplify it") from error
    except Exception as error:  # the converter raises nothing narrower
        raise GrammarError(f"`{where}`: {error}") from error
    return f"%lark {{\n{lark}\n}}"
