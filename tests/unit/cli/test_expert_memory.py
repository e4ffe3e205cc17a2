"""`--expert-memory`: wrong values end a command early; a line says what to expect."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from kimi_mlx.cli.app import app
from kimi_mlx.cli.expert_note import describe_expectation
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.expectation import Expectation

EXPECTED = Expectation(0.19, 74 * 10**9, 380 * 10**9, 0.61, 0.8, 3.72, 1, 8192)


@pytest.mark.parametrize("words", [["serve"], ["chat", "-p", "hi"], ["bench"], ["plan", "kimi-k2"]])
def test_a_wrong_value_is_a_usage_error(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--expert-memory", "much"])
    assert isinstance(result.exception, UsageError)
    assert "`much` is not an amount of memory for experts" in result.exception.message


def test_the_line() -> None:
    assert describe_expectation(EXPECTED) == (
        "19 % of the experts are in memory (74.0 GB of 380.0 GB), the others are read from the SSD: 3.7 tok/s "
        "expected, assuming that 61 % of the choices are in memory; 1 sequence at a time, because more would hardly "
        "gain speed"
    )
    unknown = describe_expectation(replace(EXPECTED, decode_tok_per_s=None, max_sequences=128))
    assert unknown.endswith("no prediction for this machine (assuming that 61 % of the choices are in memory)")
    assert "0.51 tok/s expected" in describe_expectation(replace(EXPECTED, decode_tok_per_s=0.512))
