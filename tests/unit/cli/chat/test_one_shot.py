"""`kimi-mlx chat -p`: what is printed where, and when an answer is an error."""

from __future__ import annotations

import json

import pytest
import typer

from kimi_mlx.cli.chat.chat_history import ChatHistory
from kimi_mlx.cli.chat.one_shot import answer_once
from kimi_mlx.cli.chat.options import OutputOptions
from kimi_mlx.cli.chat.tools.tool_loop import ToolLoop
from kimi_mlx.cli.placement import SINGLE_RANK
from kimi_mlx.errors import AnswerError
from tests.fakes import conversation_of

EMPTY = "the answer is empty: the model generated"


@pytest.mark.parametrize(
    ("answer", "reasoning", "output", "message"),
    [
        ("Hello", "", OutputOptions(), None),
        ("Hello", "", OutputOptions(no_stream=True), None),
        ("Hello", "", OutputOptions(quiet=True), None),
        ('{"a": 1}', "Hm.", OutputOptions(schema="a int"), None),
        ('{"a": 1', "", OutputOptions(schema="a int"), "the answer is no complete JSON: it ended after"),
        ("", "Let me think.", OutputOptions(), ", all of them reasoning"),
        ("", "", OutputOptions(no_stream=True), f"{EMPTY} 1 token, none of them text or reasoning"),
    ],
)
def test_only_the_answer_is_on_stdout_and_a_useless_one_is_an_error(
    answer: str, reasoning: str, output: OutputOptions, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if message is None:
        answer_once(conversation_of(answer, reasoning), "Hi", SINGLE_RANK, output, ToolLoop(), ChatHistory())
    else:
        with pytest.raises(AnswerError, match=message.replace("(", r"\(")):
            answer_once(conversation_of(answer, reasoning), "Hi", SINGLE_RANK, output, ToolLoop(), ChatHistory())
    printed = capsys.readouterr()
    assert printed.out.strip() == answer
    assert ("tok/s" in printed.err) == (not output.quiet)


def test_json_has_the_parsed_answer_and_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    output = OutputOptions(schema="a int", json=True)
    answer_once(conversation_of('{"a": 1}'), "Hi", SINGLE_RANK, output, ToolLoop(), ChatHistory())
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["parsed"] == {"a": 1}
    assert document["usage"]["completion_tokens"] == document["statistics"]["generated_tokens"]
    assert "error" not in document
    assert printed.err == ""
    with pytest.raises(typer.Exit) as exit:
        answer_once(conversation_of('{"a": '), "Hi", SINGLE_RANK, output, ToolLoop(), ChatHistory())
    assert exit.value.exit_code == 1
    document = json.loads(capsys.readouterr().out)
    assert document["parsed"] is None
    assert document["text"] == '{"a": '
    assert "no complete JSON" in document["error"]
