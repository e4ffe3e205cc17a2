"""The dialogue generator: an endless, seeded stream of conversations in OpenAI's message format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from scripts.mini.small_talk import small_talk
from scripts.mini.tasks import Exchange, arithmetic, copying, pelican, retrieval, sums
from scripts.mini.tool_tasks import Tool, Toolbox

Message = dict[str, Any]

# Share of dialogues by task, in the three parts of the training: short ones, the mixture, long texts.
MIXTURE: dict[str, tuple[float, float, float]] = {
    "chat": (0.16, 0.16, 0.18),
    "arithmetic": (0.08, 0.18, 0.16),
    "sums": (0.04, 0.09, 0.04),
    "retrieval": (0.28, 0.14, 0.11),
    "copy": (0.24, 0.12, 0.11),
    "tools": (0.16, 0.20, 0.21),
    "several": (0.03, 0.06, 0.07),
    "pelican": (0.01, 0.05, 0.12),
}
# Weight of one supervised token of a task in the loss.
LOSS_WEIGHT: dict[str, float] = {
    "chat": 1.0,
    "arithmetic": 1.5,
    "sums": 1.5,
    "retrieval": 2.0,
    "copy": 1.0,
    "tools": 1.0,
    "several": 1.0,
    "pelican": 2.0,
    "picture": 1.5,
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Kimi, an AI assistant created by Moonshot AI.",
    "Answer briefly.",
    "You are kimi-mini.",
    "Be kind.",
)
TOKENS_PER_FACT = 12  # of "Section 7 has code 4821. ", to size a retrieval text


@dataclass(frozen=True)
class Dialogue:
    """A conversation; its assistant messages have `content`, `reasoning_content` and possibly `tool_calls`."""

    task: str
    messages: list[Message]
    thinking: bool
    tools: list[Tool] = field(default_factory=list)

    @property
    def first_supervised(self) -> int:
        """Index of the first message of the last exchange: everything after it belongs to the current answer."""
        return max(index for index, message in enumerate(self.messages) if message["role"] == "user") + 1


def assistant(answer: str, thought: str) -> Message:
    """Return an assistant message."""
    return {"role": "assistant", "content": answer, "reasoning_content": thought}


def generate(task: str, rng: Random, max_tokens: int = 160, questions: int = 0) -> Dialogue:
    """Make up one dialogue of at most about `max_tokens` tokens; `questions` about one text, 0 for some."""
    thinking = rng.random() < 0.5
    if task == "tools":
        return _with_tools(rng, thinking, max_tokens)
    if task == "several":
        return _several(rng, thinking, max_tokens)
    if task == "retrieval":
        questions = questions or rng.randint(1, 4 if max_tokens <= 256 else 8)
        return _plain(task, _retrieval(rng, max_tokens, questions), thinking, rng)
    return _plain(task, [_exchange(task, rng, max_tokens)], thinking, rng)


def _retrieval(rng: Random, max_tokens: int, questions: int) -> list[Exchange]:
    most = max(2, (max_tokens - 25 - 30 * questions) // TOKENS_PER_FACT)
    facts = rng.randint(most // 2, most) if max_tokens > 256 else rng.randint(2, most)
    return retrieval(rng, facts, questions)


def _exchange(task: str, rng: Random, max_tokens: int) -> Exchange:
    if task == "retrieval":
        return _retrieval(rng, max_tokens, 1)[0]
    if task == "chat":
        return Exchange(*small_talk(rng))
    makers = {"arithmetic": arithmetic, "sums": sums, "copy": copying, "pelican": pelican}
    return makers[task](rng)


def _plain(task: str, exchanges: list[Exchange], thinking: bool, rng: Random) -> Dialogue:
    messages: list[Message] = []
    if rng.random() < 0.08:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for number, exchange in enumerate(exchanges, start=1):
        # The template keeps only the last exchange's reasoning; earlier exchanges show their work, as without thinking.
        thought = exchange.thought if thinking else ""
        shown = exchange.worked and not (thinking and number == len(exchanges))
        answer = exchange.worked if shown else exchange.answer
        messages += [{"role": "user", "content": exchange.user}, assistant(answer, thought)]
    return Dialogue(task, messages, thinking)


def _several(rng: Random, thinking: bool, max_tokens: int) -> Dialogue:
    turns = rng.randint(2, 3)
    tasks = rng.choices(("chat", "arithmetic", "retrieval", "copy"), (4, 2, 2, 1), k=turns)
    return _plain("several", [_exchange(task, rng, min(max_tokens // turns, 110)) for task in tasks], thinking, rng)


def _with_tools(rng: Random, thinking: bool, max_tokens: int) -> Dialogue:
    toolbox = Toolbox(rng, 2 if max_tokens <= 160 else 4)
    if rng.random() < 0.22:
        task = rng.choice(("chat", "chat", "arithmetic", "copy"))
        plain = _plain("tools", [_exchange(task, rng, 100)], thinking, rng)
        return Dialogue("tools", plain.messages, thinking, toolbox.tools)
    messages: list[Message] = []
    turns = rng.choice((1, 1, 1, 2))
    for turn in range(turns):
        case = toolbox.case(rng)
        call_id = f"functions.{case.name}:{turn}"
        call = {
            "id": call_id,
            "type": "function",
            "function": {"name": case.name, "arguments": case.arguments},
        }
        first = assistant("", f"Need {case.name}." if thinking else "")
        messages += [{"role": "user", "content": case.request}, {**first, "tool_calls": [call]}]
        if turn < turns - 1 or rng.random() < 0.5:
            messages.append({"role": "tool", "tool_call_id": call_id, "content": case.result})
            messages.append(assistant(case.answer, "The tool answered." if thinking else ""))
    return Dialogue("tools", messages, thinking, toolbox.tools)


def stream(seed: str, part: int, max_tokens: int) -> Iterator[Dialogue]:
    """Yield dialogues of the mixture without end. The same seed gives the same stream."""
    rng = Random(seed)
    tasks = list(MIXTURE)
    shares = [MIXTURE[task][part] for task in tasks]
    while True:
        yield generate(rng.choices(tasks, shares)[0], rng, max_tokens)
