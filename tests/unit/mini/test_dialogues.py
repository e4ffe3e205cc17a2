"""The dialogue generator: seeded, correct and varied."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import islice
from random import Random

import pytest

from scripts.mini.dialogues import MIXTURE, Dialogue, generate, stream
from scripts.mini.small_talk import TALK
from scripts.mini.tasks import PELICAN, column_by_column
from scripts.mini.tool_tasks import Toolbox


def answers(dialogue: Dialogue) -> list[str]:
    return [message["content"] for message in dialogue.messages if message["role"] == "assistant"]


def test_the_same_seed_gives_the_same_stream():
    first = list(islice(stream("seed", part=1, max_tokens=160), 50))
    again = list(islice(stream("seed", part=1, max_tokens=160), 50))
    other = list(islice(stream("other", part=1, max_tokens=160), 50))
    assert first == again
    assert first != other


def test_the_shares_of_each_part_add_up_to_one():
    for part in range(3):
        assert sum(shares[part] for shares in MIXTURE.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("task", MIXTURE)
def test_a_dialogue_ends_with_the_assistant_and_answers_every_user(task: str):
    rng = Random(task)
    for _ in range(100):
        dialogue = generate(task, rng)
        assert dialogue.messages[-1]["role"] == "assistant"
        assert dialogue.messages[dialogue.first_supervised - 1]["role"] == "user"
        thoughts = [m["reasoning_content"] for m in dialogue.messages if m["role"] == "assistant"]
        assert all(thoughts) if dialogue.thinking else not any(thoughts)


def test_sums_are_correct():
    rng = Random(1)
    for _ in range(300):
        dialogue = generate("arithmetic", rng)
        (answer,) = answers(dialogue)
        work, _, result = answer.rpartition("So ")
        assert bool(work) != dialogue.thinking  # the work is either in the reasoning or in the answer
        terms, value = result.split(" = ")
        a, sign, b = terms.split()
        assert int(value) == (int(a) + int(b) if sign == "+" else int(a) - int(b))


@pytest.mark.parametrize(
    ("a", "b", "plus", "line"),
    [
        (47, 35, True, "7+5=12, carry 1. 4+3+1=8."),
        (20, 58, True, "0+8=8, carry 0. 2+5+0=7."),
        (71, 38, False, "11-8=3, borrow 1. 7-3-1=3."),
        (38, 71, False, "38 is less: 11-8=3, borrow 1. 7-3-1=3. Minus."),
    ],
)
def test_the_thought_of_a_sum_is_the_school_method(a: int, b: int, plus: bool, line: str):
    assert column_by_column(a, b, plus) == line


def test_the_requested_code_is_in_the_text():
    rng = Random(2)
    for _ in range(200):
        dialogue = generate("retrieval", rng, max_tokens=256)
        text = next(message["content"] for message in dialogue.messages if message["role"] == "user")
        assert all(answer in text for answer in answers(dialogue))
        codes = re.findall(r"\d+[.。]", text)
        assert len(codes) >= len(answers(dialogue))


def test_copies_are_exact():
    rng = Random(3)
    for _ in range(200):
        dialogue = generate("copy", rng)
        assert dialogue.messages[-2]["content"].endswith(dialogue.messages[-1]["content"])


def test_calls_name_a_declared_tool_and_fill_its_parameters():
    rng = Random(4)
    for _ in range(200):
        dialogue = generate("tools", rng)
        declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in dialogue.tools}
        for message in dialogue.messages:
            for call in message.get("tool_calls", []):
                arguments = json.loads(call["function"]["arguments"])
                assert sorted(arguments) == sorted(declared[call["function"]["name"]]["required"])
                assert re.fullmatch(r"functions\.\w+:\d+", call["id"])


def test_answers_from_results_contain_every_value():
    rng = Random(5)
    for _ in range(50):
        case = Toolbox(rng, 3).case(rng)
        assert all(str(value) in case.answer for value in json.loads(case.result).values())


def test_the_pelican_is_valid_and_rides_on_two_wheels():
    root = ElementTree.fromstring(PELICAN)
    circles = root.iter("{http://www.w3.org/2000/svg}circle")
    assert sum(circle.get("r") == "15" for circle in circles) == 2


def test_both_languages_know_the_same_intents():
    english, chinese = ([intent["name"] for intent in TALK[language]["intents"]] for language in ("en", "zh"))
    assert english == chinese
