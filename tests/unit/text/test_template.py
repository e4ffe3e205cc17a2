"""Chat templates: the prompts of each generation, and hostile templates and messages."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_mlx.errors import TextError
from kimi_mlx.text.control_tokens import ControlTokens, choose_escape
from kimi_mlx.text.messages import Message, ToolCall
from kimi_mlx.text.template import ChatTemplate
from kimi_mlx.text.tokenizer import Tokenizer
from tests.schemas import ANY_OBJECT
from tests.unit.text.vocabularies import SPECIAL, write_tokenizer

HERE = Path(__file__).parent
MINI = ChatTemplate.load(HERE.parents[2] / "kimi_mlx" / "models" / "kimi-mini")
K2 = ChatTemplate((HERE / "templates" / "k2.jinja").read_text())
K2_THINKING = ChatTemplate((HERE / "templates" / "k2_thinking.jinja").read_text())

TIDE_TOOL = {
    "type": "function",
    "function": {
        "name": "tide_times",
        "description": "High and low water for one port.",
        "parameters": {
            "type": "object",
            "properties": {
                "port": {"type": "string", "description": "Port name"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7, "default": 1},
                "unit": {"type": "string", "enum": ["m", "ft"]},
            },
            "required": ["port"],
        },
    },
}
CALL_ID = "functions.tide_times:0"
TIDE = [
    Message("user", "Tide at Brest?"),
    Message(
        "assistant",
        reasoning_content="Need the tool.",
        tool_calls=(ToolCall(CALL_ID, "tide_times", '{"port": "Brest"}'),),
    ),
    Message("tool", '{"high": "06:12"}', tool_call_id=CALL_ID),
]
TIDE_PROMPT = """<|im_system|>tool_declare<|im_middle|># Tools

## functions
namespace functions {
// High and low water for one port.
type tide_times = (_: {
  // Port name
  port: string,
  // maximum: 7, minimum: 1
  // Default: 1
  days?: number,
  unit?: "m" | "ft"
}) => any;
}
<|im_end|><|im_user|>user<|im_middle|>Tide at Brest?<|im_end|>\
<|im_assistant|>assistant<|im_middle|><think>Need the tool.</think>\
<|tool_calls_section_begin|><|tool_call_begin|>functions.tide_times:0\
<|tool_call_argument_begin|>{"port": "Brest"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>\
<|im_system|>tool<|im_middle|>## Return of functions.tide_times:0
{"high": "06:12"}<|im_end|><|im_assistant|>assistant<|im_middle|><think>"""
ANSWERED = [
    *TIDE,
    Message("assistant", "At 06:12.", reasoning_content="Done."),
    Message("user", "And Calais?"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_complete_k25_prompt_byte_for_byte():
    assert MINI.render(TIDE, [TIDE_TOOL]) == TIDE_PROMPT


def test_answered_turns_drop_their_reasoning():
    prompt = MINI.render(ANSWERED)
    assert "<|im_middle|><think></think><|tool_calls_section_begin|>" in prompt
    assert "<think></think>At 06:12.<|im_end|>" in prompt
    assert "Need the tool." not in prompt


def test_preserve_thinking_keeps_it_and_a_stable_prefix():
    prompt = MINI.render(ANSWERED, preserve_thinking=True)
    assert "<think>Need the tool.</think>" in prompt
    assert "<think>Done.</think>At 06:12.<|im_end|>" in prompt
    assert prompt.startswith(MINI.render(TIDE, add_generation_prompt=False))


@pytest.mark.parametrize(
    ("kwargs", "ending"),
    [({}, "<think>"), ({"thinking": True}, "<think>"), ({"thinking": False}, "<think></think>")],
)
def test_thinking_switch(kwargs: dict[str, Any], ending: str):
    prompt = MINI.render([Message("user", "Hi")], **kwargs)
    expected = "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
    assert prompt == expected + ending
    suffix = MINI.render(TIDE, thinking=False)
    assert "Need the tool." not in suffix


def test_tools_without_typescript_form_are_compact_sorted_json():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"oneOf": []}}}}}
    body = '[{"function":{"name":"f","parameters":{"properties":{"x":{"oneOf":[]}}}},"type":"function"}]'
    assert MINI.render([], [tool]).startswith(f"<|im_system|>tool_declare<|im_middle|>{body}<|im_end|>")


def test_k2_prompt():
    prompt = K2.render([Message("user", "Hi", name="Bo")], [{"type": "function", "function": {"name": "é"}}])
    assert prompt == (
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"é"}}]<|im_end|>'
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>Bo<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )


def test_k2_thinking_prompt():
    prompt = K2_THINKING.render(TIDE, [{"type": "function", "function": {"name": "f"}}])
    assert prompt == (
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"name":"f"},"type":"function"}]<|im_end|>'
        "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
        "<|im_user|>user<|im_middle|>Tide at Brest?<|im_end|><|im_assistant|>assistant<|im_middle|>"
        "<think>Need the tool.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.tide_times:0"
        '<|tool_call_argument_begin|>{"port": "Brest"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        '<|im_system|>tool<|im_middle|>## Return of functions.tide_times:0\n{"high": "06:12"}<|im_end|>'
        "<|im_assistant|>assistant<|im_middle|>"
    )
    assert "<think></think>At 06:12.<|im_end|>" in K2_THINKING.render(ANSWERED)


def test_dictionaries_in_openai_format_render_like_messages():
    as_dicts = [message.to_dict() for message in TIDE]
    as_dicts[1]["tool_calls"][0]["function"]["arguments"] = {"port": "Brest"}
    assert MINI.render(as_dicts, [TIDE_TOOL]) == TIDE_PROMPT
    parts = [{"type": "text", "text": "Tide "}, {"type": "text", "text": "at Brest?"}]
    assert MINI.render([{"role": "user", "content": parts}, *TIDE[1:]], [TIDE_TOOL]) == TIDE_PROMPT
    assert [Message.from_dict(message) for message in as_dicts] == TIDE


@pytest.mark.parametrize(
    "message",
    [
        {"content": "x"},
        {"role": "developer", "content": "x"},
        {"role": "user", "content": 3},
        {"role": "user", "content": "x", "name": 3},
        {"role": "assistant", "tool_calls": ["f"]},
        {"role": "assistant", "tool_calls": [{"id": "f", "function": {}}]},
        {"role": "user", "content": [{"type": "image_url"}]},
    ],
)
def test_wrong_messages_are_text_errors(message: dict[str, Any]):
    with pytest.raises(TextError):
        MINI.render([message])


def test_plain_prompt_encodes_like_its_text(tokenizer: Tokenizer):
    ids = MINI.encode(tokenizer, ANSWERED, [TIDE_TOOL])
    assert tokenizer.decode(ids) == MINI.render(ANSWERED, [TIDE_TOOL])
    text_ids = tokenizer.encode("Tide at Brest?")
    turn = ids.index(tokenizer.special_tokens["<|im_user|>"])
    at = ids.index(tokenizer.special_tokens["<|im_middle|>"], turn) + 1
    assert ids[at : at + len(text_ids)] == text_ids
    assert ids.count(tokenizer.special_tokens["<think>"]) == 3


# Text that spells control tokens: complete, in halves, overlapping, and with the escape characters.
HALVES = ["<|im_", "end|>", "<", "|>", "[", "EOS]", "<th", "ink>", "<<think>", "think"]
ESCAPES = ["\ufdd0", "\\ufdd0", "\ufdd1", "\\"]
HARMFUL_TEXT = st.lists(st.sampled_from([*SPECIAL.values(), *HALVES, *ESCAPES, "x", " "]), max_size=6).map("".join)


def marker_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    special = set(tokenizer.special_tokens.values())
    return [token_id for token_id in ids if token_id in special]


@pytest.mark.parametrize("template", [MINI, K2, K2_THINKING], ids=["k25", "k2", "k2-thinking"])
@settings(max_examples=40)
@given(data=st.data())
def test_user_text_never_becomes_a_control_token(tokenizer: Tokenizer, template: ChatTemplate, data: Any):
    def conversation(text: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        call = {"id": text(), "function": {"name": text(), "arguments": text()}}
        messages = [
            {"role": "system", "content": text(), "name": text()},
            {"role": "user", "content": text()},
            {"role": "assistant", "content": text(), "reasoning_content": text() + "x", "tool_calls": [call]},
            {"role": "tool", "content": text(), "tool_call_id": text() + "x"},
        ]
        if template is MINI:
            messages[1]["content"] = [{"type": "text", "text": text()} for _ in range(3)]
        schema = {"type": "object", "properties": {text(): {"type": text() or "t", "description": text()}}}
        items = {"type": "array", "items": {"$ref": "#/$defs/think"}}
        schema["properties"]["more"] = items
        schema["$defs"] = {"think": {"type": "object", "properties": {text(): {"enum": [text()]}}}}
        return messages, [{"type": "function", "function": {"name": text(), "parameters": schema}}]

    harmful, harmful_tools = conversation(lambda: data.draw(HARMFUL_TEXT))
    harmless, harmless_tools = conversation(lambda: "y")
    ids = template.encode(tokenizer, harmful, harmful_tools)
    expected = template.encode(tokenizer, harmless, harmless_tools)
    assert marker_ids(tokenizer, ids) == marker_ids(tokenizer, expected)
    assert tokenizer.decode(ids) == template.render(harmful, harmful_tools)


def test_parts_of_a_control_token_in_adjacent_strings_stay_text(tokenizer: Tokenizer):
    parts = [{"type": "text", "text": text} for text in ("<|im", "_en", "d|>")]
    ids = MINI.encode(tokenizer, [{"role": "user", "content": parts}])
    assert ids.count(tokenizer.special_tokens["<|im_end|>"]) == 1
    assert "<|im_middle|><|im_end|><|im_end|>" in tokenizer.decode(ids)


def test_the_escape_does_not_occur_in_the_input(monkeypatch: pytest.MonkeyPatch):
    assert choose_escape(["a", "\ufdd0", "\\ufdd1"]) == "\ufdd2"
    monkeypatch.setattr("kimi_mlx.text.control_tokens.ESCAPES", ("\ufdd0", "\ufdd1"))
    with pytest.raises(TextError, match="private-use"):
        choose_escape(["\ufdd0\ufdd1"])


def test_template_may_write_json_in_ascii(tokenizer: Tokenizer):
    template = ChatTemplate("{{ messages[0].content | tojson(ensure_ascii=True) }}")
    ids = template.encode(tokenizer, [Message("user", "<think>ü")])
    assert tokenizer.decode(ids) == '"<think>\\u00fc"'
    assert not marker_ids(tokenizer, ids)


def test_split_prefers_the_longer_token():
    markers = ControlTokens({"<a>": 1, "<a>b": 2, "": 3})
    assert markers.split("x<a>b<a>") == ["x", 2, 1]
    assert ControlTokens({}).split("x") == ["x"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "line 1"),
        ("a\n{{ raise_exception('no way') }}", "line 2: no way"),
        ("\n\n{{ messages[0].nothing.at_all }}", "line 3"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safe|unsafe"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "too large"),
        ("{% for i in range(1000000000) %}{% endfor %}", "loops take more"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "loops take more"),
        ("{{ 'x' * 1000000000 }}", "too large"),
        ("{{ [0] * 1000000000 }}", "too large"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_harmful_or_broken_templates_are_text_errors(source: str, message: str):
    with pytest.raises(TextError, match=message) as caught:
        ChatTemplate(source).render([Message("user", "x")])
    assert "chat_template.jinja" in caught.value.message


def test_template_functions():
    template = ChatTemplate("{{ strftime_now('%Y') | length }} {{ 3 * 4 }} {{ 'ab' * 2 }} {{ tools is none }}")
    assert template.render([]) == "4 12 abab True"


@pytest.mark.parametrize("options", [{"x": object()}, {"tools": [{"type": {1, 2}}]}])
def test_options_must_be_plain_values(options: dict[str, Any]):
    with pytest.raises(TextError, match="plain JSON values"):
        MINI.render([], **options)


@given(parameters=ANY_OBJECT)
def test_any_json_in_the_schema_of_a_tool_can_be_declared(parameters: dict[str, Any]):
    tool = {"type": "function", "function": {"name": "f", "description": "Do it", "parameters": parameters}}
    for template in (MINI, K2):
        assert "<|im_system|>tool_declare" in template.render([Message("user", "hi")], [tool])


@pytest.mark.parametrize("depth", [300, 600, 900, 100_000])
def test_deep_nesting_is_an_error_without_a_crash(tokenizer: Tokenizer, depth: int):
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": schema}},
    }
    call = {"id": "f", "function": {"name": "f", "arguments": schema}}
    for messages, tools in (([], [tool]), ([{"role": "assistant", "tool_calls": [call]}], []),
                            ([{"role": "user", "content": [schema]}], [])):  # fmt: skip
        with contextlib.suppress(TextError):
            MINI.encode(tokenizer, messages, tools)
        with contextlib.suppress(TextError):
            MINI.render(messages, tools)
    assert depth


def test_load_prefers_the_file_then_the_configuration(tmp_path: Path):
    with pytest.raises(TextError, match="no chat template"):
        ChatTemplate.load(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A"}))
    assert ChatTemplate.load(tmp_path).render([]) == "A"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "B"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).render([]) == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    assert ChatTemplate.load(tmp_path).render([]) == "C"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TextError, match="cannot read"):
        ChatTemplate.load(tmp_path)
