"""`--expert-memory`: wrong values end a command early; a line says what to expect."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from kimi_mlx.cli.app import app
from kimi_mlx.cli.expert_note import describe_expectation, limit_hint
from kimi_mlx.errors import UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.expectation import Expectation
from kimi_mlx.session.model_status import HostStatus, ModelDeployment
from kimi_mlx.units import GIB
from tests.fakes import KIMI_MINI

EXPECTED = Expectation(0.19, 74 * 10**9, 380 * 10**9, 0.61, 0.8, 3.72, 1, 8192)


@pytest.mark.parametrize("words", [["serve"], ["chat", "-p", "hi"], ["bench"], ["plan", "kimi-k2"]])
def test_a_wrong_value_is_a_usage_error(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--expert-memory", "much"])
    assert isinstance(result.exception, UsageError)
    assert "`much` is not an amount of memory for experts" in result.exception.message


def test_a_higher_limit_of_the_gpu_is_suggested() -> None:
    mac = HostStatus("mac", "Apple M5 Max", 128 * GIB, gpu_limit_bytes=96 * GIB)
    deployment = ModelDeployment("kimi-k2", "hybrid", None, load_config(KIMI_MINI), (mac,))
    assert "`sudo sysctl iogpu.wired_limit_mb=122880`" in (limit_hint(deployment) or "")
    for other in (replace(mac, gpu_limit_bytes=120 * GIB), HostStatus("linux", "x86", 128 * GIB)):
        assert limit_hint(replace(deployment, machines=(other,))) is None


def test_the_line() -> None:
    assert describe_expectation(EXPECTED) == (
        "19 % of the experts are in memory (68.9 GiB of 353.9 GiB), the others are read from the SSD: 3.7 tok/s "
        "expected, assuming that 61 % of the choices are in memory; 1 sequence at a time, because more would hardly "
        "gain speed"
    )
    unknown = describe_expectation(replace(EXPECTED, decode_tok_per_s=None, max_sequences=128))
    assert unknown.endswith("no prediction for this machine (assuming that 61 % of the choices are in memory)")
    assert "0.51 tok/s expected" in describe_expectation(replace(EXPECTED, decode_tok_per_s=0.512))
