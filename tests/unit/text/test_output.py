"""The parser of answers: correct answers, known errors of Kimi, and random ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.text.messages import Delta, Message, ToolCall, ToolCallDelta, UnparsedToolCall
from kimi_mlx.text.output import OutputParser, opens_reasoning, parse
from kimi_mlx.text.template import ChatTemplate
from kimi_mlx.text.tokenizer import Tokenizer
from kimi_mlx.text.tool_calls import normalize_arguments, tool_name
from tests.unit.text.vocabularies import SPECIAL, small_ranks, write_tokenizer

MINI = ChatTemplate.load(Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini")
TOKENIZER_IDS = len(small_ranks()) + 256
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
WRONG_SECTION, WRONG_SECTION_END = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
BROKEN = '{"a": '


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ids_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Return the ids of control tokens and plain text; a part that begins with `=` is plain text."""
    ids: list[int] = []
    for part in parts:
        special = tokenizer.special_tokens.get(part)
        ids += [special] if special is not None else tokenizer.encode(part.removeprefix("="))
    return ids


def call(name: str = "f", index: int = 0, arguments: str = "{}") -> ToolCall:
    return ToolCall(f"functions.{name}:{index}", name, arguments)


def answer(text: str = "", reasoning: str = "", tool_calls: tuple[ToolCall, ...] = ()) -> Delta:
    """Return the delta of a whole answer, with each call in both its forms."""
    parts = (ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(tool_calls))
    return Delta(text, reasoning, tool_calls, tuple(parts))


F0 = (CALL, "functions.f:0", ARGUMENTS, "{}", CALL_END)
F1 = (CALL, "functions.f:1", ARGUMENTS, '{"x": [1, "é"]}', CALL_END)
BOTH = (call(), call("f", 1, '{"x": [1, "é"]}'))
CASES: dict[str, tuple[tuple[str, ...], Delta]] = {
    "text": (("Hi é 你好",), answer("Hi é 你好")),
    "nothing": ((), answer()),
    "thinking": (("<think>", "Hm. ", "</think>", "Hi"), answer("Hi", "Hm. ")),
    "two calls": ((SECTION, *F0, *F1, SECTION_END, "<|im_end|>"), answer(tool_calls=BOTH)),
    "text before and after": (("A ", SECTION, *F0, SECTION_END, " B"), answer("A  B", tool_calls=BOTH[:1])),
    "section inside thinking": (
        ("<think>", "Hm", SECTION, *F0, SECTION_END, "</think>", "Hi"),
        answer("Hi", "Hm", BOTH[:1]),
    ),
    "missing section end": ((SECTION, *F0, "<|im_end|>"), answer(tool_calls=BOTH[:1])),
    "missing section end, then text": ((SECTION, *F0, "\n\nSo."), answer("\n\nSo.", tool_calls=BOTH[:1])),
    "missing section end, then thinking": ((SECTION, *F0, "<think>", "Hm"), answer("", "Hm", BOTH[:1])),
    "missing section begin": (("Hi", *F0, SECTION_END), answer("Hi", tool_calls=BOTH[:1])),
    "missing call end": (
        (SECTION, *F0[:4], *F1[:4], SECTION_END),
        answer(tool_calls=BOTH),
    ),
    "missing call end at eos": ((SECTION, *F0[:4], "[EOS]"), answer(tool_calls=BOTH[:1])),
    "blanks between calls": ((SECTION, "\n", *F0, "\n ", *F1, "\n", SECTION_END), answer(tool_calls=BOTH)),
    "section without calls": (("A", SECTION, SECTION_END, "B"), answer("AB")),
    "misspelled section": (
        ("Hi ", WRONG_SECTION, *F0, WRONG_SECTION_END, "\nB"),
        answer("Hi \nB", tool_calls=BOTH[:1]),
    ),
    "misspelled section with blanks": (
        ("<think>", "Hm", WRONG_SECTION + "\n", *F0, "\n" + WRONG_SECTION_END + "\n", "<|im_end|>"),
        answer("\n", "Hm", BOTH[:1]),
    ),
    "misspelled section, no end": ((WRONG_SECTION, *F0), answer(tool_calls=BOTH[:1])),
    "misspelled marker as text": (("Say " + WRONG_SECTION + " now",), answer("Say " + WRONG_SECTION + " now")),
    "misspelled marker at the end": (("Say " + WRONG_SECTION, "<|im_end|>"), answer("Say " + WRONG_SECTION)),
    "half a misspelled marker": (
        ("Say " + WRONG_SECTION[:9], *F0),
        answer("Say <|tool_ca", tool_calls=BOTH[:1]),
    ),
    "less-than signs": (("a < b <<|tool_", "</think>", "c"), answer("a < b <<|tool_c")),
    "markers in ordinary tokens": (
        ("=<think>", "=" + SECTION, "=" + CALL, "=<|im_end|>"),
        answer("<think>" + SECTION + CALL + "<|im_end|>"),
    ),
    "id without functions.": (
        (CALL, "f:3", ARGUMENTS, "{}"),
        answer(tool_calls=(ToolCall("f:3", "f", "{}"),)),
    ),
    "id without index": (
        (CALL, " functions.a.b\n", ARGUMENTS, "{}", CALL_END),
        answer(tool_calls=(ToolCall("functions.a.b", "a.b", "{}"),)),
    ),
    "control tokens without a meaning": (
        ("A", "<|im_user|>", "[PAD]", CALL_END, ARGUMENTS, "B"),
        answer("AB"),
    ),
    "stray thinking ends": (("A", "</think>", "B", "</think>"), answer("AB")),
    "thinking marker inside a call": (
        (CALL, "f:0", ARGUMENTS, "{", "</think>", "}", CALL_END),
        answer(tool_calls=(ToolCall("f:0", "f", "{}"),)),
    ),
    "nothing after the end": (("A", "<|im_end|>", "B", *F0), answer("A")),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_of_kimi(tokenizer: Tokenizer, case: str):
    parts, expected = CASES[case]
    assert parse(tokenizer, ids_of(tokenizer, *parts)) == expected


@pytest.mark.parametrize(
    ("parts", "raw", "reason"),
    [
        ((CALL, "f:0", ARGUMENTS, BROKEN, CALL_END), f"f:0{ARGUMENTS}{BROKEN}", "arguments are not JSON: "),
        ((CALL, "f:0", ARGUMENTS, BROKEN), f"f:0{ARGUMENTS}{BROKEN}", "the call is not closed: arg"),
        (
            (CALL, "f:0", ARGUMENTS, "[1]", CALL_END),
            f"f:0{ARGUMENTS}[1]",
            "arguments are JSON but not an object",
        ),
        (
            (CALL, "f:0", ARGUMENTS, '{"a": NaN}', CALL_END),
            f'f:0{ARGUMENTS}{{"a": NaN}}',
            "arguments are not JSON",
        ),
        ((CALL, "f:0", ARGUMENTS), f"f:0{ARGUMENTS}", "the call is not closed: arguments are not JSON"),
        ((CALL, "functions.:0", ARGUMENTS, "{}", CALL_END), f"functions.:0{ARGUMENTS}{{}}", "no tool name"),
        ((CALL, "f:0", CALL_END), "f:0", "no arguments"),
        ((CALL,), "", "the call is not closed: no arguments"),
        ((CALL, "f:0", SECTION_END), "f:0", "the call is not closed: no arguments"),
    ],
)
def test_invalid_calls_are_returned_with_their_text_and_reason(
    tokenizer: Tokenizer, parts: tuple[str, ...], raw: str, reason: str
):
    whole = parse(tokenizer, ids_of(tokenizer, SECTION, *parts))
    (broken,) = whole.tool_calls
    assert isinstance(broken, UnparsedToolCall)
    assert broken.raw == raw
    assert broken.reason.startswith(reason)
    named, marker, arguments = raw.partition(ARGUMENTS)
    is_call = bool(marker) and named != "functions.:0"
    assert whole.tool_call_deltas == ((ToolCallDelta(0, "f:0", "f", arguments),) if is_call else ())
    assert broken.index == (0 if is_call else None)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("", "{}"),
        (" \n", "{}"),
        ("null", "{}"),
        ('""', "{}"),
        ('"{\\"a\\": 1}"', '{"a": 1}'),
        (json.dumps(json.dumps('{"a": "é"}')), '{"a": "é"}'),
        (' {"a": "{}"} ', ' {"a": "{}"} '),
    ],
)
def test_blank_arguments_and_arguments_encoded_twice_become_an_object(tokenizer: Tokenizer, written: str, meant: str):
    for ending in ((CALL_END,), (SECTION_END,), ("<|im_end|>",), (CALL,)):
        whole = parse(tokenizer, ids_of(tokenizer, SECTION, CALL, "functions.f:0", ARGUMENTS, written, *ending))
        assert whole.tool_calls[0] == call("f", 0, meant)
        assert_deltas_match_calls(whole)


def test_arguments_that_are_cut_off_before_they_begin_are_no_call(tokenizer: Tokenizer):
    for written in ("", " ", '"{}"'):
        (broken,) = parse(tokenizer, ids_of(tokenizer, SECTION, CALL, "functions.f:0", ARGUMENTS, written)).tool_calls
        assert isinstance(broken, UnparsedToolCall)


TOOLS = ("exec", "get_weather", "mcp__git__log", "Read", "a.b")


@pytest.mark.parametrize(
    ("call_id", "name"),
    [
        ("functions.exec:0", "exec"),
        ("functionsexec5", "exec"),
        ("functions.exec5", "exec"),
        ("functions.exec.5", "exec"),
        ("functions exec:5", "exec"),
        ("functions_get_weather_1", "get_weather"),
        ("functions.functions.exec:0", "exec"),
        ("tools.exec:0", "exec"),
        ("default_api.get_weather", "get_weather"),
        ("function.get_weather:1", "get_weather"),
        ("get_weather", "get_weather"),
        ("functions.get-weather:0", "get_weather"),
        ("functions.read:2", "Read"),
        ("functions.mcp_git_log:3", "mcp__git__log"),
        ("functions.a.b:12", "a.b"),
        ("call_get_weather_7f3a", "get_weather"),
        ("call-exec-5", "exec"),
        ("toolu_mcp__git__log", "mcp__git__log"),
        # nothing fits, so the name stays as it was written
        ("functions.search:0", "search"),
        ("functions.exec_all:0", "exec_all"),
        ("call_7f3a", "call_7f3a"),
        ("call_exec_or_Read", "call_exec_or_Read"),
        ("functions.:0", ""),
    ],
)
def test_an_id_that_is_not_quite_right_names_the_tool_that_fits(tokenizer: Tokenizer, call_id: str, name: str):
    assert tool_name(call_id, TOOLS) == name
    ids = ids_of(tokenizer, SECTION, CALL, "=" + call_id, ARGUMENTS, "{}", CALL_END)
    whole = parse(tokenizer, ids, tool_names=TOOLS)
    assert [part.name for part in whole.tool_call_deltas] == ([name] if name else [])
    assert [part.name for part in whole.tool_calls if isinstance(part, ToolCall)] == ([name] if name else [])


def test_an_id_that_fits_several_tools_names_none_of_them():
    assert tool_name("functionsexec5", ("exec", "exec5")) == "functionsexec5"
    assert tool_name("functions.EXEC:5", ("exec", "Exec")) == "EXEC"
    assert tool_name("call_get_weather_1", ("get_weather", "weather")) == "get_weather"
    assert tool_name("functions.python30", ("python3",)) == "python3"
    assert tool_name("functionsexec5") == "functionsexec5"


@given(name=st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,12}", fullmatch=True), names=st.lists(st.text(max_size=8)))
def test_a_right_id_always_names_its_own_tool(name: str, names: list[str]):
    assert tool_name(f"functions.{name}:3", [*names, name]) == name
    assert tool_name(name, [*names, name]) == name


def test_a_call_of_an_offered_tool_needs_no_argument_marker(tokenizer: Tokenizer):
    ids = ids_of(tokenizer, SECTION, CALL, "functions.exec:0", CALL_END, SECTION_END)
    whole = parse(tokenizer, ids, tool_names=TOOLS)
    assert whole == answer(tool_calls=(call("exec"),))


@pytest.mark.parametrize("arguments", ["[" * 100_000, "1" * 10_000, '{"a": ' + "9" * 10_000 + "}"])
def test_arguments_that_python_cannot_read(tokenizer: Tokenizer, arguments: str):
    (broken,) = parse(tokenizer, ids_of(tokenizer, CALL, "f:0", ARGUMENTS, arguments, CALL_END)).tool_calls
    assert isinstance(broken, UnparsedToolCall)


def test_prompt_decides_where_the_answer_starts(tokenizer: Tokenizer):
    assert opens_reasoning(tokenizer, ids_of(tokenizer, "a", "<think>"))
    assert not opens_reasoning(tokenizer, ids_of(tokenizer, "a", "<think>", "</think>"))
    assert not opens_reasoning(tokenizer, [])
    ids = ids_of(tokenizer, "<think>", "Hm", "</think>", "Hi")
    assert parse(tokenizer, ids, starts_in_reasoning=True) == parse(tokenizer, ids[1:], True) == Delta("Hi", "Hm")
    assert parse(tokenizer, ids_of(tokenizer, "Hm"), True) == Delta("", "Hm")


def test_unknown_ids_and_half_characters_are_replaced(tokenizer: Tokenizer):
    snow = list("☃".encode())
    assert parse(tokenizer, [*snow[:2], 10**9, -1, *snow]) == Delta("\ufffd\ufffd\ufffd☃")
    assert parse(tokenizer, [*snow[:2], tokenizer.special_tokens["<think>"], *snow]) == Delta("\ufffd", "☃")
    assert parse(tokenizer, snow[:1]) == Delta("\ufffd")


def test_text_is_returned_as_soon_as_it_is_certain(tokenizer: Tokenizer):
    parser = OutputParser(tokenizer, False)
    shown = [parser.add(byte).text for byte in "a<b<|tool_x☃".encode()]
    assert shown == ["a", "", "<b", "", "", "", "", "", "", "", "<|tool_x", "", "", "☃"]
    assert parser.finish() == parser.finish() == Delta()
    assert parser.add(65) == Delta()


def test_a_call_is_streamed_in_deltas(tokenizer: Tokenizer):
    parser = OutputParser(tokenizer, True)
    written = ids_of(
        tokenizer, SECTION, CALL, "functions.f:7", ARGUMENTS, *'{"a":1}', CALL_END, *F0[:2], ARGUMENTS, "x"
    )
    deltas = [delta for delta in map(parser.add, written) if delta]
    assert deltas[0] == Delta(tool_call_deltas=(ToolCallDelta(0, "functions.f:7", "f"),))
    assert deltas[1:8] == [Delta(tool_call_deltas=(ToolCallDelta(0, arguments=text),)) for text in '{"a":1}']
    assert deltas[8] == Delta(tool_calls=(ToolCall("functions.f:7", "f", '{"a":1}'),))
    assert deltas[9:] == [Delta(tool_call_deltas=(ToolCallDelta(1, "functions.f:0", "f"),))]
    last = parser.finish()
    (broken,) = last.tool_calls
    assert last.tool_call_deltas == (ToolCallDelta(1, arguments="x"),)
    assert isinstance(broken, UnparsedToolCall)
    assert broken.index == 1


def assert_deltas_match_calls(whole: Delta):
    """Check that each named call has one delta with the same id, name and arguments, in the same order."""
    parts = iter(whole.tool_call_deltas)
    for index, call in enumerate(c for c in whole.tool_calls if isinstance(c, ToolCall) or c.index is not None):
        part = next(parts)
        assert part.index == index
        if isinstance(call, ToolCall):
            assert (part.id, part.name, part.arguments) == (call.id, call.name, call.arguments)
        else:
            assert call.index == index
            named, _, arguments = call.raw.partition(ARGUMENTS)
            assert (part.id, part.arguments) == (named.strip(), arguments)
            assert normalize_arguments(arguments) == arguments or call.reason.startswith("the call is not closed")
            assert part.name
    assert next(parts, None) is None


PARTS = st.one_of(
    st.sampled_from([*SPECIAL.values(), *F0, *F1, SECTION, CALL, ARGUMENTS, CALL_END, WRONG_SECTION]),
    st.sampled_from([WRONG_SECTION_END, WRONG_SECTION[:8], "=" + SECTION, " ", "\n", BROKEN, "<", "Hi ☃ 漢字"]),
)


@given(data=st.data())
def test_streamed_deltas_add_up_to_the_whole_answer_at_every_cut(tokenizer: Tokenizer, data: Any):
    parts = data.draw(st.lists(st.one_of(PARTS, st.integers(0, TOKENIZER_IDS)), max_size=14))
    inside = data.draw(st.booleans())
    ids = [i for part in parts for i in ([part] if isinstance(part, int) else ids_of(tokenizer, part))]
    whole = parse(tokenizer, ids, inside)
    parser, streamed = OutputParser(tokenizer, inside), Delta()
    for cut, token_id in enumerate(ids, start=1):
        streamed += parser.add(token_id)
        # Streamed text is final: an answer that ends at this point begins with it.
        closed = parse(tokenizer, ids[:cut], inside)
        assert closed.text.startswith(streamed.text)
        assert closed.reasoning.startswith(streamed.reasoning)
        assert closed.tool_calls[: len(streamed.tool_calls)] == streamed.tool_calls
        assert [(part.id, part.name) for part in closed.tool_call_deltas] == [
            (p.id, p.name) for p in streamed.tool_call_deltas
        ]
        assert all(
            c.arguments.startswith(s.arguments)
            for c, s in zip(closed.tool_call_deltas, streamed.tool_call_deltas, strict=True)
        )
    assert streamed + parser.finish() == whole
    assert_deltas_match_calls(whole)


@given(ids=st.lists(st.integers(-5, TOKENIZER_IDS + 5), max_size=60), inside=st.booleans())
def test_random_ids_never_raise_and_nothing_follows_the_end(tokenizer: Tokenizer, ids: list[int], inside: bool):
    until_end = next((at for at, i in enumerate(ids) if i in tokenizer.eos_token_ids), len(ids))
    assert parse(tokenizer, ids[:until_end], inside) == parse(tokenizer, ids, inside)


TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("<|>")), max_size=12)
ARGUMENT_VALUES = st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.text(max_size=6)), max_size=3)
TOOL_CALL = st.tuples(st.sampled_from(["f", "get_x", "a.b"]), ARGUMENT_VALUES)


@given(thought=TEXT, text=TEXT, called=st.lists(TOOL_CALL, max_size=3), thinking=st.booleans())
def test_parse_inverts_the_template(
    tokenizer: Tokenizer, thought: str, text: str, called: list[tuple[str, dict[str, Any]]], thinking: bool
):
    calls = tuple(
        ToolCall(f"functions.{name}:{i}", name, json.dumps(arguments, ensure_ascii=False))
        for i, (name, arguments) in enumerate(called)
    )
    expected = answer(text, thought if thinking else "", calls)
    question = Message("user", "Well?")
    turns = [question, Message("assistant", text, expected.reasoning, calls)]
    prompt = MINI.encode(tokenizer, [question], thinking=thinking)
    whole = MINI.encode(tokenizer, turns, add_generation_prompt=False, thinking=thinking, preserve_thinking=True)
    assert whole[: len(prompt)] == prompt
    assert parse(tokenizer, whole[len(prompt) :], opens_reasoning(tokenizer, prompt)) == expected
