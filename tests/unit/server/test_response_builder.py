"""Response builder: text that was held back, because a stop text may begin in it, stays in order."""

from __future__ import annotations

import pytest

from kimi_mlx.engine.events import Finished, Statistics, Token
from kimi_mlx.server.api_types import DeltaEvent, FinishEvent
from kimi_mlx.server.response_builder import ChatReader, ResponseBuilder
from kimi_mlx.text.call_ids import to_kimi_ids
from kimi_mlx.text.output import OutputParser
from kimi_mlx.text.tokenizer import Tokenizer
from tests.fakes import KIMI_MINI

CALL = ("<|tool_call_begin|>", "functions.f:0", "<|tool_call_argument_begin|>", "{}", "<|tool_call_end|>")
NAMELESS = ("<|tool_call_begin|>", ":0", "<|tool_call_argument_begin|>", "{}", "<|tool_call_end|>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    assert KIMI_MINI is not None
    return Tokenizer.load(KIMI_MINI)


def build(tokenizer: Tokenizer, stop: str, *parts: str) -> list[str]:
    """Return the content of each event, and the finish reason."""
    reader = ChatReader(OutputParser(tokenizer, False), to_kimi_ids([])[1].allocator())
    builder = ResponseBuilder(0, tokenizer, reader, (stop,), counts_prompt=True)
    special = tokenizer.special_tokens
    ids = [i for part in parts for i in ([special[part]] if part in special else tokenizer.encode(part))]
    end = builder.finish(Finished("stop", Statistics(1, 0, len(ids), 0.1, 0.1, 0)))
    events = [*(event for i in ids for event in builder.add(Token(i))), *end]
    return [
        f"{event.delta.text}{[part.name or part.arguments for part in event.delta.tool_call_deltas] or ''}"
        if isinstance(event, DeltaEvent)
        else event.reason
        for event in events
        if not (isinstance(event, DeltaEvent) and event.delta.tool_calls)
    ]


def test_text_held_back_is_sent_before_a_call_and_before_the_end(tokenizer: Tokenizer):
    call = ["['f']", *(f"['{tokenizer.decode([i])}']" for i in tokenizer.encode("{}")), "tool_calls"]
    assert build(tokenizer, "ab", "a", *CALL) == ["a", *call]
    assert build(tokenizer, "ab", "a") == ["a", "stop"]
    assert build(tokenizer, "ab", "a", "b", *CALL) == ["stop"]


def test_a_call_without_a_name_does_not_count_as_a_call(tokenizer: Tokenizer):
    assert build(tokenizer, "ab", *NAMELESS) == ["stop"]


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 4])
def test_an_answer_that_ends_inside_a_character_has_no_more_reasoning_than_tokens(tokenizer: Tokenizer, num_bytes: int):
    ids = [*tokenizer.encode("Hm. "), *(tokenizer.tokens().index(bytes([byte])) for byte in "😀".encode()[:num_bytes])]
    reader = ChatReader(OutputParser(tokenizer, True), to_kimi_ids([])[1].allocator())
    builder = ResponseBuilder(0, tokenizer, reader, (), counts_prompt=True)
    for id in ids:
        list(builder.add(Token(id)))
    *_, finish = builder.finish(Finished("length", Statistics(1, 0, len(ids), 0.1, 0.1, 0)))
    assert isinstance(finish, FinishEvent)
    assert (finish.usage.reasoning_tokens, finish.usage.completion_tokens) == (len(ids), len(ids))
