"""Texts of the page: both languages have all that the page shows, and nothing else."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

STATIC = files("kimi_mlx.server.page").joinpath("static")

ENTRY = re.compile(r'^  (\w+): "((?:[^"\\]|\\.)*)",$')
COMMENT = re.compile(r"^ *//.*$", re.MULTILINE)
CALL = re.compile(r"(?<![\w.])text\(")
LITERAL_CALL = re.compile(CALL.pattern + r'"(\w+)"(?:,\s*(\{))?')
OBJECT_TOKEN = re.compile(r'[{}()\[\]]|(?<=[{,])\s*(\w+)(?=\s*[:,}])|"[^"]*"')
ATTRIBUTE = re.compile(r'data-i18n(?:-label|-placeholder)?="(\w+)"')
DEFINITION = "export function text("


def source(name: str) -> str:
    return STATIC.joinpath(name).read_text(encoding="utf-8")


def texts(name: str) -> dict[str, str]:
    """Read the texts of a language: one a line."""
    body = COMMENT.sub("", source(name)).partition("export default {")[2].rpartition("};")[0]
    entries = [ENTRY.fullmatch(line) for line in body.splitlines() if line.strip()]
    assert all(entries), 'a line is not `  key: "text",`'
    pairs = [(entry[1], entry[2]) for entry in entries if entry]
    assert len(dict(pairs)) == len(pairs), "a key stands twice"
    return dict(pairs)


ENGLISH, CHINESE = texts("english.js"), texts("chinese.js")

SCRIPTS = {
    item.name: COMMENT.sub("", item.read_text(encoding="utf-8"))
    for item in STATIC.iterdir()
    if item.name.endswith(".js") and item.name not in ("english.js", "chinese.js")
}


def places(text: str) -> set[str]:
    """Return the names of the values in a text."""
    return set(re.findall(r"\{(\w+)\}", text))


def values_of(script: str, start: int) -> set[str]:
    """Return the names in the object literal that begins at `start` of a script."""
    depth, names = 0, set[str]()
    for token in OBJECT_TOKEN.finditer(script, start):
        if depth == 1 and token[1]:
            names.add(token[1])
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(token[0], 0)
        if depth == 0:
            break
    return names


def test_both_languages_have_the_same_keys_and_values() -> None:
    assert ENGLISH.keys() == CHINESE.keys()
    assert {key: places(text) for key, text in ENGLISH.items()} == {key: places(text) for key, text in CHINESE.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_call_names_a_text_and_its_values(name: str) -> None:
    script = SCRIPTS[name].replace(DEFINITION, "")
    calls = list(LITERAL_CALL.finditer(script))
    assert len(calls) == len(CALL.findall(script)), "the key of a text is not a literal"
    for call in calls:
        values = values_of(script, call.end() - 1) if call[2] else set[str]()
        assert values == places(ENGLISH[call[1]]), call[1]


def test_each_text_is_used() -> None:
    used = set(ATTRIBUTE.findall(source("index.html")))
    for script in SCRIPTS.values():
        used |= {call[1] for call in LITERAL_CALL.finditer(script)}
    assert used == ENGLISH.keys()
