"""Small talk of kimi-mini about itself and about kimi-mlx; the texts are in `small_talk.json`."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from scripts.mini.words import THINGS, THINGS_ZH

# Per language: intents (phrasings, a thought, the one answer) and open questions, which it cannot answer.
TALK: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("small_talk.json").read_text(encoding="utf-8"))
CHINESE_SHARE = 0.35
UNKNOWN_SHARE = 0.22
COMMON_SHARE = 0.3  # share of the first phrasings of an intent, whose answers must be correct
COMMON_PHRASINGS = 4
OPENERS = ("", "", "", "", "", "please ", "hey, ", "ok, ", "so, ", "well, ", "hi, ", "um, ", "now ")


def dress(phrase: str, rng: Random) -> str:
    """Vary opener, capital letter and punctuation of an English phrase."""
    text = rng.choice(OPENERS) + phrase if rng.random() < 0.4 else phrase
    if rng.random() < 0.65:
        text = text[0].upper() + text[1:]
    elif rng.random() < 0.05:
        text = text.upper()
    return text + rng.choice(TALK["en"]["endings"])


def small_talk(rng: Random) -> tuple[str, str, str]:
    """Return (user text, thought, answer) of one exchange."""
    chinese = rng.random() < CHINESE_SHARE
    talk = TALK["zh" if chinese else "en"]
    if rng.random() < UNKNOWN_SHARE:
        return _open_question(talk, chinese, rng), talk["unknown_thought"], talk["unknown_answer"]
    intent = rng.choice(talk["intents"])
    common = rng.random() < COMMON_SHARE
    phrase = rng.choice(intent["phrasings"][:COMMON_PHRASINGS] if common else intent["phrasings"])
    user = phrase + rng.choice(talk["endings"]) if chinese else dress(phrase, rng)
    return user, intent["thought"], intent["answer"]


def _open_question(talk: dict[str, Any], chinese: bool, rng: Random) -> str:
    if chinese:
        thing = rng.choice(THINGS_ZH)
        return rng.choice(talk["open_questions"]).format(thing) + rng.choice(talk["endings"])
    thing = rng.choice(THINGS)
    thing = f"{rng.choice(('the ', 'a ', 'my ', ''))}{thing}"
    return dress(rng.choice(talk["open_questions"]).format(thing), rng)
