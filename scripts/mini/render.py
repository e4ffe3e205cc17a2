"""Render dialogues to token ids, split into segments as in Kimi K2.5's template, with a weight per token.

The tests compare every prompt with what `kimi_mlx.text.template` renders from `chat_template.jinja`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kimi_mlx.text.tokenizer import Tokenizer
from kimi_mlx.text.tool_declarations import to_typescript
from scripts.mini.dialogues import LOSS_WEIGHT, Dialogue, Message
from scripts.mini.scenes import Scene


@dataclass(frozen=True)
class Row:
    """Token ids, the loss weight of each (0: it belongs to a prompt), and the scene of the picture, if there is one."""

    ids: list[int]
    weights: list[float]
    scene: Scene | None = None

    @property
    def supervised(self) -> list[int]:
        """Positions of the tokens of answers."""
        return [position for position, weight in enumerate(self.weights) if weight]


class Renderer:
    """Renders dialogues with one tokenizer; repeated texts come from a cache."""

    def __init__(self, tokenizer: Tokenizer):
        self._special = tokenizer.special_tokens
        self.media_pad = self._special["<|media_pad|>"]
        self._text = lru_cache(maxsize=20000)(lambda text: tuple(tokenizer.encode(text)))

    def render(self, dialogue: Dialogue, scene: Scene | None = None) -> Row:
        """Return the whole dialogue: prompts as the model reads them, answers as it writes them."""
        ids: list[int] = []
        weights: list[float] = []

        def prompt(*pieces: str) -> None:
            new = self.encode(pieces)
            ids.extend(new)
            weights.extend([0.0] * len(new))

        def answer(*pieces: str) -> None:
            new = self.encode(pieces)
            ids.extend(new)
            weights.extend([LOSS_WEIGHT[dialogue.task]] * len(new))

        if dialogue.tools:
            prompt("<|im_system|>", "tool_declare", "<|im_middle|>", to_typescript(dialogue.tools), "<|im_end|>")
        for index, message in enumerate(dialogue.messages):
            if message["role"] != "assistant":
                prompt(*_turn(message))
                continue
            prompt("<|im_assistant|>", "assistant", "<|im_middle|>", "<think>")
            just_now = index >= dialogue.first_supervised and dialogue.thinking
            thought = message["reasoning_content"] if just_now else ""
            (answer if just_now else prompt)(thought, "</think>")
            answer(message["content"], *_calls(message), "<|im_end|>")
        return Row(ids, weights, scene)

    def encode(self, pieces: Sequence[str]) -> list[int]:
        """Return the ids of pieces: each a special token or a text."""
        ids: list[int] = []
        for piece in pieces:
            special = self._special.get(piece)
            if special is None:
                ids.extend(self._text(piece))
            else:
                ids.append(special)
        return ids


def _turn(message: Message) -> tuple[str, ...]:
    role, content = message["role"], message["content"]
    if role == "tool":
        content = f"## Return of {message['tool_call_id']}\n{content}"
    marker = {"user": "<|im_user|>", "system": "<|im_system|>", "tool": "<|im_system|>"}[role]
    body = (content,) if isinstance(content, str) else _parts(content)
    return (marker, role, "<|im_middle|>", *body, "<|im_end|>")


def _parts(content: list[Message]) -> tuple[str, ...]:
    """Return text and pictures; a picture ends in a line break, which is one text with what follows."""
    pieces: list[str] = []
    rest = ""
    for part in content:
        if part["type"] == "text":
            rest += part["text"]
        else:
            pads = ["<|media_pad|>"] * part["num_tokens"]
            pieces += [rest, "<|media_begin|>", "image", "<|media_content|>", *pads, "<|media_end|>"]
            rest = "\n"
    return (*pieces, rest)


def _calls(message: Message) -> tuple[str, ...]:
    calls = message.get("tool_calls", [])
    if not calls:
        return ()
    pieces: list[str] = ["<|tool_calls_section_begin|>"]
    for call in calls:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        pieces += [
            "<|tool_call_begin|>",
            call["id"],
            "<|tool_call_argument_begin|>",
            text,
            "<|tool_call_end|>",
        ]
    return (*pieces, "<|tool_calls_section_end|>")
