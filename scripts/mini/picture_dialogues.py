"""Dialogues of kimi-mini-vl: questions about a picture, and kimi-mini's dialogues under the name of kimi-mini-vl."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from scripts.mini.dialogues import Dialogue, Message, assistant, stream
from scripts.mini.scenes import PHRASES, Scene
from scripts.mini.tasks import Exchange

SECOND_QUESTION_SHARE = {"same": 0.6, "side": 0.7, "pair": 0.7, "number": 0.2}
TEXT_FIRST_SHARE = 0.25  # share of the messages with the text before the picture
NO_PICTURE_SHARE = 0.04
NO_PICTURE = ("There is no picture.", "I see no picture.")  # thought, answer
RENAMED = {
    "kimi-mini": "kimi-mini-vl",
    "three million": "four million",
    "三百万": "四百万",
    "find a code": "name shapes in a picture, find a code",
    "在文字里找代码": "看图说形状和在文字里找代码",
}


def picture_dialogue(scene: Scene, num_tokens: int, rng: Random) -> Dialogue:
    """Return one or two questions about a picture of `num_tokens` tokens."""
    tasks = rng.sample(list(scene.exchanges), len(scene.exchanges))
    count = 2 if len(tasks) > 1 and rng.random() < SECOND_QUESTION_SHARE[scene.kind] else 1
    exchanges = [scene.exchanges[task] for task in tasks[:count]]
    picture = {"type": "image", "num_tokens": num_tokens}
    text = {"type": "text", "text": exchanges[0].user}
    parts = [text, picture] if rng.random() < TEXT_FIRST_SHARE else [picture, text]
    return _dialogue("picture", exchanges, rng.random() < 0.5, parts)


def _dialogue(task: str, exchanges: list[Exchange], thinking: bool, content: object) -> Dialogue:
    messages: list[Message] = []
    for exchange in exchanges:
        user = exchange.user if messages else content
        thought = exchange.thought if thinking else ""
        messages += [{"role": "user", "content": user}, assistant(exchange.answer, thought)]
    return Dialogue(task, messages, thinking)


def text_dialogues(seed: str) -> Iterator[Dialogue]:
    """Yield dialogues without pictures; the model gives its own name, and says when there is no picture."""
    rng = Random(seed)
    for dialogue in stream(seed, part=1, max_tokens=160):
        if rng.random() < NO_PICTURE_SHARE:
            question = rng.choice(PHRASES[rng.choice(("what", "number", "total"))])
            yield _dialogue("chat", [Exchange(question, *NO_PICTURE)], rng.random() < 0.5, question)
        else:
            yield renamed(dialogue)


def renamed(dialogue: Dialogue) -> Dialogue:
    """Return the dialogue with kimi-mini-vl's name and size in the answers of its small talk."""
    if dialogue.task not in ("chat", "several"):
        return dialogue
    messages = [dict(message) for message in dialogue.messages]
    for message in messages:
        if message["role"] == "assistant":
            for old, new in RENAMED.items():
                message["content"] = message["content"].replace(old, new)
    return replace(dialogue, messages=messages)
