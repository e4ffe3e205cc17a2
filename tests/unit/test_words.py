"""Plain English: phrases of the language that this project once spoke do not come back."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHRASES = {
    "so many": "N, or the number",
    "how many of": "number of",
    "how manieth": "1-based number of",
    "anew": "again",
    "mend|mends|mended|mending": "fix",
    "whoever": "the client, the caller, a process that",
    "stands? in the way": "is a problem",
    "falls? silent|fell silent": "stops responding",
    "hands on|handed on": "send to the next rank",
    "troubles?": "error, or problem",
    "word by word|a word of its own": "what it is",
    "shelf|parcels?": "pool, slice",
    "asked for": "requested",
}
"""Pattern of a phrase -> what to write instead."""

SUFFIXES = {".py", ".md", ".sh", ".toml"}
EXCEPT = {"CHANGELOG.md", "CONTRIBUTING.md"}
"""They name such phrases."""
FOLDERS = ("kimi_mlx/models/", "scripts/mini/", "tests/")
"""The toy model speaks as it was trained; tests quote what programs print."""


@cache
def tracked_lines() -> list[tuple[str, str]]:
    """Return the lines of the project's text files, each with its place."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # not a clone
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if not name.startswith(FOLDERS) and name not in EXCEPT]
    files = [ROOT / name for name in names if Path(name).suffix in SUFFIXES and (ROOT / name).is_file()]
    return [
        (f"{path.relative_to(ROOT)}:{number}", line.strip())
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]


def find_phrase(pattern: str) -> list[str]:
    """Return the lines that have a phrase, in code spelled with blanks or underscores."""
    phrase = re.compile(rf"(?<![a-z])({pattern.replace(' ', '[ _]')})(?![a-z])", re.IGNORECASE)
    return [f"{place}: {line}" for place, line in tracked_lines() if phrase.search(line)]


@pytest.mark.parametrize(("pattern", "instead"), PHRASES.items())
def test_phrase_is_not_used(pattern: str, instead: str) -> None:
    lines = find_phrase(pattern)
    assert not lines, f"write instead: {instead}\n" + "\n".join(lines)
