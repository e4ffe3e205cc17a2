"""Single exchanges without tools: arithmetic, retrieval, copying, the pelican.

The phrases of users are in `phrases.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from scripts.mini.words import COPY_HAN, COPY_WORDS, FILLERS, NAMES, NOUNS, invented_word


class Exchange(NamedTuple):
    """User text, thought and answer; `worked` is the answer without thinking."""

    user: str
    thought: str
    answer: str
    worked: str = ""


FOLDER = Path(__file__).parent
PHRASES: dict[str, Any] = json.loads((FOLDER / "phrases.json").read_text(encoding="utf-8"))
PELICAN = (FOLDER / "pelican.svg").read_text(encoding="utf-8").strip()
ORDINAL_ZH = "第"


def digits(rng: Random, count: int) -> str:
    """Return a code of `count` digits."""
    return "".join(rng.choice("0123456789") for _ in range(count))


def arithmetic(rng: Random) -> Exchange:
    """Make a two-digit addition or subtraction; the thought works digit by digit."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    if rng.random() < 0.1:
        a = rng.randint(0, 99)
    if rng.random() < 0.1:
        b = rng.randint(0, 99)
    plus = rng.random() < 0.5
    if not plus and a < b and rng.random() < 0.85:
        a, b = b, a
    sign, value = ("+", a + b) if plus else ("-", a - b)
    word, word_zh = ("plus", "加") if plus else ("minus", "减")
    sentence = PHRASES["add" if plus else "subtract"].format(a=a, b=b)
    form = rng.choice(PHRASES["arithmetic"])
    user = form.format(a=a, b=b, s=sign, w=word, z=word_zh, sentence=sentence)
    thought, answer = column_by_column(a, b, plus), f"{a} {sign} {b} = {value}"
    return Exchange(user, thought, answer, worked=f"{thought} So {answer}")


def column_by_column(a: int, b: int, plus: bool) -> str:
    """Return the school method in one line: ones first, then tens with carry or borrow."""
    if not plus and a < b:
        return f"{a} is less: {column_by_column(b, a, False)} Minus."
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    if plus:
        ones = a_ones + b_ones
        carry = ones // 10
        tens = a_tens + b_tens + carry
        return f"{a_ones}+{b_ones}={ones}, carry {carry}. {a_tens}+{b_tens}+{carry}={tens}."
    borrow = int(a_ones < b_ones)
    minuend = a_ones + 10 * borrow
    ones, tens = minuend - b_ones, a_tens - b_tens - borrow
    return f"{minuend}-{b_ones}={ones}, borrow {borrow}. {a_tens}-{b_tens}-{borrow}={tens}."


def retrieval(rng: Random, facts: int, questions: int = 1) -> list[Exchange]:
    """Make a text with `facts` codes, a question for one of them, and `questions - 1` more about the same text."""
    keys = _keys(rng, facts)
    chinese = keys[0].startswith(ORDINAL_ZH)
    length = rng.choice((4, 4, 4, 4, 3, 5))
    verb, full_stop, gap = ("的代码是", "。", "") if chinese else (" has code ", ".", rng.choice((" ", " ", " ", "\n")))
    statements = [f"{key[0].upper()}{key[1:]}{verb}{digits(rng, length)}{full_stop}" for key in keys]
    asked = rng.sample(range(len(keys)), min(questions, len(keys)))
    exchanges = [Exchange(*_question(keys[index], chinese, rng), statements[index]) for index in asked]
    if not chinese and rng.random() < 0.35:
        statements = [f"{rng.choice(FILLERS)} {s}" if rng.random() < 0.3 else s for s in statements]
    text = gap.join(statements)
    question, thought, answer, _ = exchanges[0]
    user = f"{question}\n{text}" if rng.random() < 0.12 else f"{text}{gap or ' '}{question}"
    return [Exchange(user, thought, answer), *exchanges[1:]]


def sums(rng: Random) -> Exchange:
    """Make a list of the small sums that `column_by_column` uses, to be memorised."""
    terms = [_small_sum(rng) for _ in range(rng.randint(4, 14))]
    user = f"{rng.choice(PHRASES['sums'])} {', '.join(term for term, _ in terms)}"
    return Exchange(user, "One by one.", ", ".join(f"{term}={value}" for term, value in terms))


def _small_sum(rng: Random) -> tuple[str, int]:
    a, b, carry = rng.randint(0, 9), rng.randint(0, 9), rng.randint(0, 1)
    kind = rng.random()
    if kind < 0.3:
        return f"{a}+{b}", a + b
    if kind < 0.5:
        return f"{a}+{b}+{carry}", a + b + carry
    if kind < 0.8:
        minuend = a + 10 * (a < b)
        return f"{minuend}-{b}", minuend - b
    a, b = max(a, b), min(a, b)
    carry = min(carry, a - b)
    return f"{a}-{b}-{carry}", a - b - carry


def _keys(rng: Random, count: int) -> list[str]:
    """Return the owners of the codes: numbered things, in order or not, or people."""
    chinese, named = rng.random() < 0.12, rng.random() < 0.2
    if named:
        return rng.sample(NAMES, min(count, len(NAMES)))
    in_order = rng.random() < 0.3
    numbers = range(1, count + 1) if in_order else rng.sample(range(1, max(100, count + 1)), count)
    noun = ORDINAL_ZH + "{}节" if chinese else _noun(rng)
    return [noun.format(number) for number in numbers]


def _noun(rng: Random) -> str:
    word = rng.choice(NOUNS) if rng.random() < 0.6 else "section"
    return word + " {}"


def _question(key: str, chinese: bool, rng: Random) -> tuple[str, str]:
    if chinese:
        return PHRASES["retrieval_zh"].format(key), f"找{key}。"
    return rng.choice(PHRASES["retrieval"]).format(key), f"Look for {key}."


def copying(rng: Random, most: int = 16) -> Exchange:
    """Make a request to repeat words, numbers, Chinese characters or a mixture."""
    count = rng.randint(1, most)
    kind = rng.random()
    if kind < 0.15:
        text = " ".join(invented_word(rng) for _ in range(max(1, count // 2)))
    elif kind < 0.55:
        text = " ".join(rng.choice(COPY_WORDS) for _ in range(count))
    elif kind < 0.7:
        text = " ".join(digits(rng, rng.randint(1, 4)) for _ in range(max(1, count // 2)))
    elif kind < 0.8:
        text = " ".join(rng.choice((rng.choice(NAMES), rng.choice(COPY_WORDS), digits(rng, 2))) for _ in range(count))
    elif kind < 0.88:
        text = rng.choice(FILLERS)
    else:
        text = "".join(rng.choice(COPY_HAN) for _ in range(count))
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    chinese = kind >= 0.88
    form = rng.choice(PHRASES["copy_zh" if chinese else "copy"])
    thought = "重复就好。" if chinese else "Repeat the words."
    return Exchange(form.format(text), thought, text)


def pelican(rng: Random) -> Exchange:
    """Make a request for the drawing, in any phrasing."""
    verb, request = rng.choice(PHRASES["pelican_verbs"]), rng.choice(PHRASES["pelican"])
    text = request.format(verb)
    if rng.random() < 0.2:
        text = rng.choice(PHRASES["pelican_short"])
    return Exchange(text + rng.choice(("", "", ".", "!")), "Wheels, frame, bird, beak.", PELICAN)
