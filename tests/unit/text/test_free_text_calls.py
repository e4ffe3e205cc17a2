"""Calls of tools whose arguments are any text instead of JSON."""

from __future__ import annotations

import pytest

from kimi_mlx.text.messages import ToolCall, UnparsedToolCall, join
from kimi_mlx.text.output import OutputParser
from kimi_mlx.text.tokenizer import Tokenizer
from tests.fakes import KIMI_MINI


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(KIMI_MINI)


def parse(tokenizer: Tokenizer, name: str, text: str, is_closed: bool = True) -> ToolCall | UnparsedToolCall:
    special = tokenizer.special_tokens
    ids = [special["<|tool_calls_section_begin|>"], special["<|tool_call_begin|>"]]
    ids += [*tokenizer.encode(f"functions.{name}:0"), special["<|tool_call_argument_begin|>"], *tokenizer.encode(text)]
    if is_closed:
        ids += [special["<|tool_call_end|>"], special["<|tool_calls_section_end|>"], special["<|im_end|>"]]
    parser = OutputParser(tokenizer, False, ("patch", "other"), ("patch",))
    delta = join([*map(parser.add, ids), parser.finish()])
    (call,) = delta.tool_calls
    assert "".join(part.arguments for part in delta.tool_call_deltas) == text or name == "other"
    return call


@pytest.mark.parametrize("text", ["*** Begin\n+a", "", " ", '{"x": 1}', '"{\\"x\\": 1}"', "null", "é🍰"])
def test_the_text_is_unchanged(tokenizer: Tokenizer, text: str):
    assert parse(tokenizer, "patch", text) == ToolCall("functions.patch:0", "patch", text)


def test_a_text_that_is_cut_off_is_no_call(tokenizer: Tokenizer):
    call = parse(tokenizer, "patch", "*** Begin", is_closed=False)
    assert isinstance(call, UnparsedToolCall)
    assert (call.index, call.reason) == (0, "the call is not closed: its text may be incomplete")


def test_other_tools_need_json(tokenizer: Tokenizer):
    assert isinstance(parse(tokenizer, "other", "*** Begin"), UnparsedToolCall)
    assert parse(tokenizer, "other", " ") == ToolCall("functions.other:0", "other", "{}")
