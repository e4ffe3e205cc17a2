"""The Python examples of docs/serve.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.running_server import RunningServer

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
OUTPUTS = (r'get_weather {"city": "Paris"}\n.*21', r"name=.* age=\d+", r"Hello!.*\['kimi-mini'\]", r"Hello!")
"""Expected output of each example."""


@pytest.mark.parametrize(
    ("code", "output"), list(zip(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL), OUTPUTS, strict=True))
)
def test_example(running: RunningServer, code: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code.replace("http://127.0.0.1:8080", running.url), "docs/serve.md", "exec"), {"__name__": "example"})
    assert re.search(output, capsys.readouterr().out, re.DOTALL)
