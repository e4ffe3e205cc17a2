"""The HTTP server of the command line: names of the model."""

from __future__ import annotations

import pytest

from kimi_mlx.cli.http_server import served_names
from kimi_mlx.store.model_ref import resolve_model_name
from tests.fakes import KIMI_MINI


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("kimi-mini-vl", ["gpt-4o", "kimi-mini-vl"]),
        ("kimi-k2.5", ["gpt-4o", "kimi-k2.5", "mlx-community/Kimi-K2.5", "Kimi-K2.5"]),
        (str(KIMI_MINI), ["gpt-4o", "kimi-mini"]),
    ],
)
def test_names_of_the_user_come_before_those_of_the_model(model: str, expected: list[str]) -> None:
    names = served_names(resolve_model_name(model), ["gpt-4o", "gpt-4o"])
    assert [name for name in expected if name in names] == expected
    assert names[0] == "gpt-4o"
    assert all(isinstance(name, str) for name in names)
    assert len(set(names)) == len(names)
