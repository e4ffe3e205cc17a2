"""TeX formulas to MathML, which browsers show without a library: the TeX that models write, not all of it.

All tags are written here; all text of the formula is escaped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from markdown_it.common.utils import escapeHtml

MAX_CHARS = 2000
"""Maximum length of a formula."""

MAX_DEPTH = 60
"""Maximum depth of nested groups and arguments."""


class UnknownTexError(ValueError):
    """A formula has TeX that is not supported, which the message names."""


def to_mathml(tex: str, *, is_display: bool) -> str:
    """Return a formula as MathML.

    Args:
        tex: the formula without its delimiters.
        is_display: whether it stands on lines of its own.

    Raises:
        UnknownTexError: the formula has TeX that is not supported.
    """
    if len(tex) > MAX_CHARS:
        raise UnknownTexError(f"{len(tex)} characters")
    parser = _Parser(TOKEN.findall(tex))
    body = parser.row(())
    if parser.token:
        raise UnknownTexError(parser.token)
    display = ' display="block"' if is_display else ""
    return f"<math{display}>{body}</math>"


TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|\d+(?:\.\d+)?|\s+|.", re.DOTALL)

ESCAPED = re.compile(r"\\([%$#&_{} ])")

SYMBOLS: dict[str, Any] = json.loads((resources.files("kimi_mlx.server.page") / "tex_symbols.json").read_text("utf-8"))
"""Characters of the commands of TeX (without their backslash), by kind.

`with_limits` are operators whose scripts stand above and below them in a display. `alphabets` have the characters for
A, a and 0, which the others follow in Unicode, and the exceptions. `environments` have the delimiters of their tables.
"""

LETTERS, OPERATORS, DELIMITERS = SYMBOLS["letters"], SYMBOLS["operators"], SYMBOLS["delimiters"]
WITH_LIMITS, INTEGRALS, FUNCTIONS = SYMBOLS["with_limits"], SYMBOLS["integrals"], SYMBOLS["functions"]
ACCENTS, BELOW, SPACES, TEXTS = SYMBOLS["accents"], SYMBOLS["below"], SYMBOLS["spaces_em"], SYMBOLS["texts"]
IGNORED, NEGATED, CHARACTERS = SYMBOLS["ignored"], SYMBOLS["negated"], SYMBOLS["characters"]
ALPHABETS, FENCES = SYMBOLS["alphabets"], SYMBOLS["environments"]


@dataclass
class _Parser:
    """Translates the tokens of a formula in order.

    Args:
        tokens: tokens of the formula.
        position: index of the next token.
        depth: number of open groups and arguments.
    """

    tokens: list[str]
    position: int = 0
    depth: int = 0

    @property
    def token(self) -> str:
        """The next token; empty at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.token
        self.position += 1
        return token

    def skip_spaces(self) -> None:
        while self.token and self.token.isspace():
            self.position += 1

    def expect(self, token: str) -> None:
        self.skip_spaces()
        if self.take() != token:
            raise UnknownTexError(f"no {token}")

    def row(self, ends: tuple[str, ...]) -> str:
        """Translate up to one of the tokens `ends`, which is left, or to the end of the formula."""
        self.go_deeper()
        parts: list[str] = []
        self.skip_spaces()
        while self.token and self.token not in ends:
            if self.token in ("}", "&", r"\\", r"\right", r"\end"):
                raise UnknownTexError(self.token)
            parts.append(self.scripted())
            self.skip_spaces()
        self.depth -= 1
        return f"<mrow>{''.join(parts)}</mrow>" if len(parts) != 1 else parts[0]

    def go_deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnknownTexError("too deep")

    def scripted(self) -> str:
        """Translate an atom with its superscript, subscript and primes."""
        name = self.token.removeprefix("\\")
        has_limits = self.token.startswith("\\") and (
            name in WITH_LIMITS or name in ("overbrace", "underbrace", "operatorname*")
        )
        base = "<mrow></mrow>" if self.token in ("^", "_", "'") else self.atom()
        above = below = ""
        primes = 0
        while True:
            self.skip_spaces()
            if self.token in (r"\limits", r"\nolimits"):
                self.take()
            elif self.token == "'":
                self.take()
                primes += 1
            elif self.token == "^" and not above:
                self.take()
                above = self.argument()
            elif self.token == "_" and not below:
                self.take()
                below = self.argument()
            elif self.token in ("^", "_"):
                raise UnknownTexError("two scripts")
            else:
                break
        if primes:
            prime = f"<mo>{OPERATORS['prime'] * primes}</mo>"
            above = f"<mrow>{prime}{above}</mrow>" if above else prime
        over, under, both = ("mover", "munder", "munderover") if has_limits else ("msup", "msub", "msubsup")
        if above and below:
            return f"<{both}>{base}{below}{above}</{both}>"
        if above:
            return f"<{over}>{base}{above}</{over}>"
        return f"<{under}>{base}{below}</{under}>" if below else base

    def argument(self) -> str:
        """Translate a group in braces, or one token."""
        self.skip_spaces()
        if self.token == "{":
            self.take()
            body = self.row(("}",))
            self.expect("}")
            return body
        if self.token.isdigit() and len(self.token) > 1:  # x^12 is x^1 2
            self.tokens[self.position : self.position + 1] = list(self.token)
        return self.atom()

    def raw_argument(self) -> str:
        """Return the text of a group in braces."""
        self.expect("{")
        parts: list[str] = []
        depth = 1
        while self.token:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return "".join(parts)
            if token not in ("{", "}"):
                parts.append(token)
        raise UnknownTexError("no }")

    def atom(self) -> str:
        self.go_deeper()
        translated = self.translate(self.take())
        self.depth -= 1
        return translated

    def translate(self, token: str) -> str:
        """Translate a token and its arguments."""
        if token == "{":
            body = self.row(("}",))
            self.expect("}")
            return f"<mrow>{body}</mrow>"
        if token.startswith("\\") and len(token) > 1:
            return self.command(token[1:])
        if token[:1].isdigit():
            return f"<mn>{token}</mn>"
        if token in "([{)]}|":
            return f'<mo stretchy="false">{token}</mo>' if token else self.fail("end")
        if token == "~":
            return _space(0.28)
        if token in ("$", "#", "%", "\\"):
            return self.fail(token)
        tag = "mi" if token.isalpha() else "mo"
        return f"<{tag}>{escapeHtml(CHARACTERS.get(token, token))}</{tag}>"

    def fail(self, tex: str) -> str:
        raise UnknownTexError(tex)

    def command(self, name: str) -> str:
        if name in LETTERS:
            return f"<mi>{LETTERS[name]}</mi>"
        if name in WITH_LIMITS:
            return f'<mo movablelimits="true">{WITH_LIMITS[name]}</mo>'
        if name in INTEGRALS:
            return f"<mo>{INTEGRALS[name]}</mo>"
        if name in OPERATORS:
            return f"<mo>{escapeHtml(OPERATORS[name])}</mo>"
        if name in DELIMITERS:
            return f'<mo stretchy="false">{DELIMITERS[name]}</mo>'
        if name in FUNCTIONS:
            return f"<mi>{name}</mi>"
        if name in SPACES:
            return _space(SPACES[name])
        if name in TEXTS:
            words = ESCAPED.sub(r"\1", self.raw_argument())
            return f"<mtext>{escapeHtml(words).replace(' ', '&nbsp;')}</mtext>"
        if name in ALPHABETS:
            return "".join(["<mrow>", *(_in_alphabet(name, letter) for letter in self.raw_argument()), "</mrow>"])
        if name in ACCENTS:
            return f'<mover accent="true">{self.argument()}<mo>{ACCENTS[name]}</mo></mover>'
        if name in BELOW:
            return f'<munder accentunder="true">{self.argument()}<mo>{BELOW[name]}</mo></munder>'
        if name in IGNORED:
            return "<mrow></mrow>"
        if name in ("%", "$", "#", "&", "_"):
            return f"<mo>{escapeHtml(name)}</mo>"
        return self.structure(name)

    def structure(self, name: str) -> str:
        """Translate a command with arguments."""
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return f"<mfrac>{self.argument()}{self.argument()}</mfrac>"
        if name in ("binom", "dbinom", "tbinom"):
            return (
                f'<mrow><mo>(</mo><mfrac linethickness="0">{self.argument()}{self.argument()}</mfrac><mo>)</mo></mrow>'
            )
        if name == "sqrt":
            return self.root()
        if name in ("overset", "stackrel"):
            above, base = self.argument(), self.argument()
            return f"<mover>{base}{above}</mover>"
        if name == "underset":
            below, base = self.argument(), self.argument()
            return f"<munder>{base}{below}</munder>"
        if name in ("xrightarrow", "xleftarrow"):
            arrow = "→" if name == "xrightarrow" else "←"
            return f'<mover><mo stretchy="true">{arrow}</mo>{self.argument()}</mover>'
        if name in ("boxed", "fbox"):
            return f'<mrow class="boxed">{self.argument()}</mrow>'
        if name in ("pmod", "pod"):
            return f"{_space(0.4)}<mrow><mo>(</mo><mi>mod</mi>{_space(0.3)}{self.argument()}<mo>)</mo></mrow>"
        if name in ("tag", "tag*"):
            return f"{_space(2)}<mtext>({escapeHtml(self.raw_argument())})</mtext>"
        if name == "not":
            return f"<mo>{NEGATED.get(self.take()) or self.fail(name)}</mo>"
        if name == "left":
            return self.fenced()
        if name == "begin":
            return self.environment(self.raw_argument())
        return self.fail(name)

    def root(self) -> str:
        self.skip_spaces()
        if self.token != "[":
            return f"<msqrt>{self.argument()}</msqrt>"
        self.take()
        index = self.row(("]",))
        self.expect("]")
        return f"<mroot>{self.argument()}{index}</mroot>"

    def fenced(self) -> str:
        opening = self.delimiter()
        body = self.row((r"\right",))
        self.expect(r"\right")
        return f"<mrow>{opening}{body}{self.delimiter()}</mrow>"

    def delimiter(self) -> str:
        self.skip_spaces()
        token = self.take()
        if token == ".":
            return ""
        name = DELIMITERS.get(token.removeprefix("\\"), token) if token.startswith("\\") else token
        if len(name) != 1 or name.isalnum():
            raise UnknownTexError(token)
        return f'<mo fence="true" stretchy="true">{escapeHtml(name)}</mo>'

    def environment(self, name: str) -> str:
        if name not in FENCES:
            raise UnknownTexError(name)
        if name == "array":
            self.raw_argument()
        rows = [""]
        while True:
            rows[-1] += f"<mtd>{self.row(('&', chr(92) * 2, chr(92) + 'end'))}</mtd>"
            end = self.take()
            if end == r"\\":
                self.skip_spaces()
                if self.token == "[":  # a distance to the next row
                    while self.token and self.take() != "]":
                        pass
                rows.append("")
            elif end == r"\end":
                break
            elif not end:
                raise UnknownTexError("no end")
        if self.raw_argument() != name:
            raise UnknownTexError("another end")
        is_aligned = name.startswith(("align", "split"))
        kind = "aligned" if is_aligned else "cases" if name == "cases" else "matrix"
        table = "".join(f"<mtr>{row}</mtr>" for row in rows if row != "<mtd><mrow></mrow></mtd>")
        fences = [f'<mo fence="true" stretchy="true">{fence}</mo>' for fence in FENCES[name]]
        before, after = (*fences, "", "")[:2]
        return f'<mrow>{before}<mtable class="{kind}">{table}</mtable>{after}</mrow>'


def _space(em: float) -> str:
    return f'<mspace width="{em}em"></mspace>'


def _in_alphabet(name: str, letter: str) -> str:
    alphabet = ALPHABETS[name]
    if letter in alphabet and letter not in "Aa0":
        return f"<mi>{alphabet[letter]}</mi>"
    first = "A" if letter.isupper() else "a" if letter.islower() else "0"
    if letter.isspace():
        return ""
    if not letter.isascii() or not letter.isalnum() or not alphabet[first]:
        raise UnknownTexError(f"{name} {letter}")
    return f"<mi>{chr(ord(alphabet[first]) + ord(letter) - ord(first))}</mi>"
