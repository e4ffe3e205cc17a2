"""`kimi-mlx chat -p`: an answer without text is reported on stderr."""

from __future__ import annotations

import pytest

from kimi_mlx.cli.chat.one_shot import print_answer
from tests.fakes import conversation_of


@pytest.mark.parametrize(
    ("answer", "reasoning", "message"),
    [
        ("Hello", "", None),
        ("", "Let me think.", ", all of them reasoning"),
        ("", "", "the answer is empty: the model generated 1 token, none of them text or reasoning"),
    ],
)
def test_an_empty_answer_is_reported(
    answer: str, reasoning: str, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    print_answer(conversation_of(answer, reasoning), "Hi")
    output = capsys.readouterr()
    assert output.out.strip() == answer
    assert ("the answer is empty" in output.err) == (message is not None)
    assert (message or "") in " ".join(output.err.split())
