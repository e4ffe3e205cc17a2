"""Settings from environment variables."""

from __future__ import annotations

from kimi_mlx.settings import Settings


def test_settings_come_from_the_environment() -> None:
    assert Settings.from_environment({}).model == "kimi-mini"
    assert Settings.from_environment({"KIMI_MLX_MODEL": ""}).model == "kimi-mini"
    assert Settings.from_environment({"KIMI_MLX_MODEL": "moonlight"}).model == "moonlight"
