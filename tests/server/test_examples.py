"""The Python examples of docs/serve.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.server.running_server import RunningServer

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
OUTPUTS = (r'get_weather {"city": "Paris"}\n.*21', r"name=.* age=\d+", r"Hello!.*\['kimi-mini'\]", r"Hello!")
"""Expected output of each example; the one with a picture is in test_image_answers."""


def run_example(code: str, server: RunningServer) -> None:
    """Run an example; close its client, whose socket the garbage collector may find before the client itself."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code.replace("http://127.0.0.1:8080", server.url), "docs/serve.md", "exec"), names)
    names["client"].close()


@pytest.mark.parametrize(
    ("code", "output"), list(zip([code for code in EXAMPLES if "picture.png" not in code], OUTPUTS, strict=True))
)
def test_example(running: RunningServer, code: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_example(code, running)
    assert re.search(output, capsys.readouterr().out, re.DOTALL)
