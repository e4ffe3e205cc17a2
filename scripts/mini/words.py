"""Word lists of the dialogue generator, from `words.json`."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

_POOLS: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))

THINGS: tuple[str, ...] = tuple(_POOLS["things"].split())
THINGS_ZH: tuple[str, ...] = tuple(_POOLS["things_zh"].split())
COPY_WORDS: tuple[str, ...] = tuple(_POOLS["copy_words"].split())
COPY_HAN: str = _POOLS["copy_han"]
NAMES: tuple[str, ...] = tuple(_POOLS["names"].split())
CITIES: tuple[str, ...] = tuple(_POOLS["cities"].split())
NOUNS: tuple[str, ...] = tuple(_POOLS["nouns"].split())
FILLERS: tuple[str, ...] = tuple(_POOLS["fillers"])

_CONSONANTS = (
    "b",
    "d",
    "f",
    "g",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "st",
    "br",
    "sh",
    "ch",
    "tr",
)
_VOWELS = ("a", "e", "i", "o", "u", "ee", "ou", "ai")
_ENDS = ("", "n", "r", "l", "s", "t", "ck", "ng", "field", "ton", "ville", "burg")


def invented_word(rng: Random) -> str:
    """Return a made-up word, so that the model cannot rely on known words when it copies."""
    syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    return "".join(syllables) + rng.choice(_ENDS)
