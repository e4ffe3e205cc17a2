"""What docs/serve.md gives to be copied."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.running_server import RunningServer

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
SAID = (r'get_weather {"city": "Paris"}\n.*21', r"name=.* age=\d+", r"Hello!.*\['kimi-mini'\]", r"Hello!")
"""By each example in Python."""


@pytest.mark.parametrize(
    ("code", "said"), list(zip(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL), SAID, strict=True))
)
def test_it_works(running: RunningServer, code: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code.replace("http://127.0.0.1:8080", running.url), "docs/serve.md", "exec"), {"__name__": "example"})
    assert re.search(said, capsys.readouterr().out, re.DOTALL)
