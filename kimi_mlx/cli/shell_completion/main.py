"""`kimi-mlx __complete SHELL LINE`: what the shells' scripts call at each Tab. Not for users."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

from kimi_mlx.cli.shell_completion.complete import Completion, complete
from kimi_mlx.errors import KimiMlxError

BASH_BREAKS = "=:@"
"""Characters at which bash begins a new word; its candidates are only what follows the last one."""


def main(shell: str, line: str) -> None:
    """Print the candidates for the last word of a line; print none if anything is wrong with it."""
    words = split_line(line)
    try:
        found = complete(words[1:-1], words[-1])
    except (KimiMlxError, OSError):
        found = Completion()
    if shell == "bash":
        found = _cut(found, words[-1])
    print(f"{found.paths}\t{found.prefix}")
    for value, about in found.values:
        print(f"{value}\t{about}")
    sys.stdout.flush()


def split_line(line: str) -> list[str]:
    """Return the words of a line up to the cursor, at least two; the last one is being typed, and may be empty.

    Quotes and backslashes are removed, also of a quote that is still open.
    """
    words, is_open = [""], False
    for part in re.finditer(r"""\\(.)|'([^']*)'?|"((?:[^"\\]|\\.)*)"?|(\s+)|([^\s\\'"]+)|\\$""", line, re.DOTALL):
        escaped, single, double, blank, plain = part.groups()
        if blank:
            words += [""] if is_open else []
            is_open = False
            continue
        is_open = True
        if double is not None:
            double = re.sub(r"\\(.)", r"\1", double)
        words[-1] += escaped or single or double or plain or ""
    return words if len(words) > 1 else [*words, ""]


def _cut(found: Completion, word: str) -> Completion:
    """Remove from the candidates what bash takes for earlier words."""
    length = max(word.rfind(character) for character in BASH_BREAKS) + 1
    return replace(found, values=[(value[length:], about) for value, about in found.values])
