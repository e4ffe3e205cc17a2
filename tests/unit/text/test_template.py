"""Chat templates: the prompts of each generation, and hostile templates and messages."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import TextError
from kimi_mlx.text import template_budget
from kimi_mlx.text.control_tokens import ControlTokens, choose_escape
from kimi_mlx.text.messages import Message, ToolCall
from kimi_mlx.text.template import ChatTemplate, check_text_files
from kimi_mlx.text.tokenizer import Tokenizer
from tests.examples import examples
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
@examples(40)
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
        ("{" * 300_000, "more than 100000"),
        ("{{ " + "(" * 90_000 + " }}", "compiled|expected"),
        ("{% for i in range(1000000000) %}{% endfor %}", "loops take more"),
        pytest.param(
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "loops take more",
            marks=pytest.mark.slow,
        ),
        ("{{ 'x' * 1000000000 }}", "too large"),
        ("{{ [0] * 1000000000 }}", "too large"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_harmful_or_broken_templates_are_text_errors(source: str, message: str):
    with pytest.raises(TextError, match=message) as caught:
        ChatTemplate(source).render([Message("user", "x")])
    assert "chat_template.jinja" in caught.value.message


def repeated(start: str, operation: str) -> str:
    """Return a template that applies an operation on `ns.s` 60 times."""
    return f"{{% set ns = namespace(s={start}) %}}" + f"{{% set ns.s = {operation} %}}" * 60


HARMFUL = {
    "doubled by ~": repeated("'abcdefgh'", "ns.s ~ ns.s"),
    "doubled by +": repeated("'abcdefgh'", "ns.s + ns.s"),
    "doubled by %": repeated("'abcdefgh'", "'%s%s' % (ns.s, ns.s)"),
    "doubled by format": repeated("'abcdefgh'", "'%s%s' | format(ns.s, ns.s)"),
    "doubled by join": repeated("'abcdefgh'", "[ns.s, ns.s] | join"),
    "doubled by join method": repeated("'abcdefgh'", "'-'.join([ns.s, ns.s])"),
    "doubled by replace": repeated("'abcdefgh'", "ns.s | replace('a', 'aa')"),
    "squared by replace": repeated("'a' * 4000", "ns.s.replace('a', ns.s)"),
    "doubled by a macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + repeated("'abcdefgh'", "m(ns.s)"),
    "doubled list": repeated("[1, 2]", "ns.s + ns.s"),
    "doubled nested list": repeated("[1, 2]", "[ns.s, ns.s]"),
    "doubled nested tuple": repeated("(1, 2)", "(ns.s, ns.s)"),
    "doubled object": repeated("{}", "{'a': ns.s, 'b': ns.s}"),
    "doubled object by dict": repeated("{}", "dict(a=ns.s, b=ns.s)"),
    "equal nested lists": repeated("[1]", "[ns.s, ns.s]") + repeated("[1]", "[ns.s, ns.s]"),
    "namespaces in namespaces": "{% set ns = namespace() %}"
    + "".join(f"{{% set n{i} = namespace(a=n{i - 1}, b=n{i - 1}) %}}" for i in range(1, 60))
    + "{{ n59 }}"
    + "{% for a in range(1000000) %}{% endfor %}" * 2,
    "large list as text": "{% set s = 'x' * 1000000 %}{% set l = [s] * 100000 %}{{ l }}",
    "large list as JSON": "{% set s = 'x' * 1000000 %}{% set l = [s] * 100000 %}{{ l | tojson }}",
    "JSON with a wide indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "JSON of many lines": "{% set l = [[[[[1]]]]] * 100000 %}{{ l | tojson(indent=900) }}",
    "large output": "{% set s = 'x' * 1000000 %}{% for i in range(100000) %}{{ s }}{% endfor %}",
    "large output of a block": "{% set s = 'x' * 1000000 %}{% set t %}{% for i in range(100000) %}{{ s }}{% endfor %}"
    "{% endset %}",
    "many large texts": "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}"
    "{% set ns.l = ns.l + ['x' * 30000000] %}{% endfor %}",
    "many slices": "{% set s = 'x' * 30000000 %}{% set ns = namespace(l=[]) %}{% for i in range(100000) %}"
    "{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "wide percent": "{{ '%1000000000d' % 1 }}",
    "wide percent by argument": "{{ '%*d' % (1000000000, 1) }}",
    "wide format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format_map method": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "center method": "{{ 'x'.center(1000000000) }}",
    "ljust method": "{{ 'x'.ljust(1000000000) }}",
    "zfill method": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs method": "{{ '\\t'.expandtabs(1000000000) }}",
    "translate method": "{{ ('x' * 1000000).translate({120: 'y' * 100000}) }}",
    "method by attr": "{{ ('x' | attr('center'))(1000000000) }}",
    "method by subscript": "{{ 'x'['center'](1000000000) }}",
    "method by map": "{{ ['x'] | map(attribute='center') | list }}{{ 'x'.center(1000000000) }}",
    "bytes of an integer": "{{ (1).to_bytes(1000000000, 'big') }}",
    "center filter": "{{ 'x' | center(1000000000) }}",
    "wordwrap filter": "{{ ('x ' * 1000000) | wordwrap(3) }}",
    "indent filter": "{{ ('x\n' * 1000000) | indent(1000000) }}",
    "xmlattr filter": "{{ {'a': 'x' * 1000000} | xmlattr }}",
    "urlize filter": "{{ ('x.com ' * 1000000) | urlize }}",
    "round filter": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "batch filter": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice filter": "{{ [1] | slice(1000000000) | list }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "products": "{% set ns = namespace(n=3) %}" + "{% set ns.n = ns.n * ns.n %}" * 60,
    "letters of a text": "{% for a in 'x' * 30000000 %}{% for b in 'x' * 30000000 %}{% endfor %}{% endfor %}",
    "letters as a list": "{{ ('x' * 30000000) | list | length }}",
    "split into letters": "{{ ('x ' * 15000000).split() | length }}",
    "split at letters": "{{ ('x,' * 15000000).split(',') | length }}",
    "lines": "{{ ('\n' * 30000000).splitlines() | length }}",
    "sorted letters": "{{ ('x' * 30000000) | sort | length }}",
    "nested loops over a list": "{% set l = [0] * 3000 %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "cross product by map": "{% set l = range(100000) | list %}{% for a in l %}{{ l | map('abs') | max }}{% endfor %}",
    "search from the end": "{{ ('a' * 2000000).rfind('ab' ~ 'a' * 1000000) }}",
    "split from the end": "{{ ('a' * 2000000).rsplit('ab' ~ 'a' * 1000000) }}",
    "strip many characters": "{{ ('a' * 9000000).strip('b' * 9000000 ~ 'a') }}",
    "trim many characters": "{{ ('a' * 9000000) | trim('b' * 9000000 ~ 'a') }}",
    "open keys of a format": "{{ ('%(' * 1000000) % 1 }}",
    "open keys of a format filter": "{{ ('%(' * 1000000) | format(1) }}",
    "width after a key with parentheses": "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "large integers": "{{ (('f' * 9000000) | int(base=16)) % (('f' * 5000000) | int(base=16)) > 1 }}",
    "long attribute": "{{ [1] | map(attribute='a.' * 4000000, default={}) | list }}",
    "long attribute of groups": "{{ [1] | groupby('ab.' * 3000000, default={}) }}",
    "long attribute of a sort": "{{ [1] | sort(attribute='ab,' * 3000000) }}",
    "wide separators of JSON": "{{ ([1] * 30000) | tojson(separators=('x' * 200000, ':')) | length }}",
    "escaped quotes": "{{ ('\U0001f600' ~ '\\'' * 9000000) | e | length }}",
    "upper case of three letters": "{{ ('\u0390' * 9000000) | upper | length }}",
    "escaped emoji": "{{ ['\U0001f600' * 9000000] | tojson(ensure_ascii=true) | length }}",
    "wide date": "{{ strftime_now('%1000000000Y') }}",
    "long date": "{{ strftime_now('%Y' * 1000000) }}",
    "constant at compile time": "{{ 'x' | replace('x', 'y' * 100000000) }}",
    "tests": "{% set l = [1] * 900000 %}{% for i in range(1000000) %}{{ l + [i] is eq(l) }}{% endfor %}",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_templates_made_to_harm_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch):
    for limit in ("MAX_STEPS", "MAX_CHARS", "MAX_BYTES"):  # a tenth, to be quick
        monkeypatch.setattr(template_budget, limit, getattr(template_budget, limit) // 10)
    with pytest.raises(TextError, match=r"chat_template\.jinja"):
        ChatTemplate(HARMFUL[name]).render([Message("user", "x")])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.sweep if at % 4 else pytest.mark.slow) for at, name in enumerate(HARMFUL)],
)
def test_templates_made_to_harm_end_in_time_and_memory(name: str):
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(TextError, match=r"chat_template\.jinja"):
            ChatTemplate(HARMFUL[name]).render([Message("user", "x")])
        assert time.thread_time() - start < 10  # below 2 s without tracemalloc, which makes it several times slower
        assert tracemalloc.get_traced_memory()[1] < 2**30
    finally:
        tracemalloc.stop()


def test_a_long_conversation_is_within_the_limits_of_a_template():
    turns = [Message("user", "word " * 400), Message("assistant", "text " * 400, reasoning_content="think " * 100)]
    messages = [message for _ in range(1500) for message in turns]  # 6 MB
    assert len(MINI.render(messages, [TIDE_TOOL] * 100)) > 6_000_000
    assert len(K2_THINKING.render(messages, [TIDE_TOOL] * 100)) > 6_000_000


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for c in messages[0].content.split(' ') %}{{ loop.index ~ c }}{{ ',' if not loop.last }}{% endfor %}",
            "1a,2b,3c",
        ),
        ("{{ messages | map(attribute='role') | join('-') }}", "user-assistant"),
        ("{{ (messages | selectattr('role', 'equalto', 'user') | list | length) + 1 }}", "2"),
        ("{{ '%s: %d' % ('n', 3) }} {{ '%(a)s' | format(a=1) }} {{ 'a\nb' | indent(2) }}", "n: 3 1 a\n  b"),
        ("{{ {'b': 1, 'a': [1, 2]} | tojson(indent=1) }}", '{\n "b": 1,\n "a": [\n  1,\n  2\n ]\n}'),
        ("{% for a in [1, [2, 3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "123"),
        (
            "{% set n = namespace(l=[]) %}{% for m in messages %}{% set n.l = n.l + [m.role] %}{% endfor %}{{ n.l }}",
            "['user', 'assistant']",
        ),
        (
            "{{ messages[-1:][0].role }} {{ 'x' ~ 1 ~ none }} {{ 'ab'.replace('a', 'c') | upper }}",
            "assistant x1None CB",
        ),
        (
            "{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %} {{ 1 < 2 < 3 }} {{ 'a' in 'cab' }}",
            "x1 True True",
        ),
    ],
)
def test_what_published_templates_use_works(source: str, expected: str):
    assert ChatTemplate(source).render([Message("user", "a b c"), Message("assistant", "d")]) == expected


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


@pytest.mark.parametrize(
    "depth", [600, 100_000, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (300, 900))]
)
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


def render_found(folder: Path, tools: list[dict[str, Any]] | None = None) -> str:
    return ChatTemplate.load(folder).render([], tools)


def test_templates_are_read_from_the_places_that_transformers_knows(tmp_path: Path):
    with pytest.raises(TextError, match="no chat template"):
        ChatTemplate.load(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A"}))
    assert render_found(tmp_path) == render_found(tmp_path, [TIDE_TOOL]) == "A"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "B"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert (render_found(tmp_path), render_found(tmp_path, [TIDE_TOOL])) == ("B", "T")
    config.write_text(json.dumps({"chat_template": named[:1]}))
    assert render_found(tmp_path) == "T"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert render_found(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").write_text("C")
    assert render_found(tmp_path) == render_found(tmp_path, [TIDE_TOOL]) == "C"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("U")
    assert (render_found(tmp_path), render_found(tmp_path, [TIDE_TOOL])) == ("C", "U")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TextError, match="cannot read"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("value", [["A"], [{"name": "default"}], [None]])
def test_named_templates_in_another_form_are_an_error(tmp_path: Path, value: object):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(TextError, match="not a list of names and templates"):
        ChatTemplate.load(tmp_path)


def test_a_marker_that_is_no_special_token_is_an_error(tmp_path: Path):
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(MINI.sources[0])
    check_text_files(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = config.pop("added_tokens_decoder")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TextError, match=r"`<\|im_assistant\|>`.* special tokens \(missing"):
        check_text_files(folder)
    listed = [{"id": int(i), **token} for i, token in decoder.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}))
    check_text_files(folder)  # transformers 5 writes the added tokens to this file only
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({token["content"]: token["id"] for token in listed}))
    check_text_files(folder)
    others = {i: token for i, token in decoder.items() if token["content"] != "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": others}))
    with pytest.raises(TextError, match=r"`<\|im_end\|>`.*missing 1 of"):
        check_text_files(folder)


def test_placeholders_of_processors_are_not_markers():
    template = ChatTemplate("<|im_user|>{{ '<|kimi_k25_video_placeholder|>' }}<|im_{{ 1 }}|>")
    assert template.markers() == {"<|im_user|>"}
