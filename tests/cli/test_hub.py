"""Models from the hub: the real client against a small hub on loopback that can break off."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import KIMI_MINI
from tests.hub import Hub, environment

pytestmark = pytest.mark.slow

IMPATIENT = """
from kimi_mlx.cli.app import main
from kimi_mlx.hub import retries
retries.FIRST_DELAY_S = 0.01
main()
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({"owner/model": KIMI_MINI}) as hub:
        yield hub


def chat(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPATIENT, *arguments]
    variables = {**os.environ, **environment(hub, home)}
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=100, check=False
    )


def test_a_repository_is_fetched_once_and_then_answers(hub: Hub, tmp_path: Path) -> None:
    first = chat(hub, tmp_path, "chat", "owner/model", "-p", "hi")
    assert first.returncode == 0, first.stderr
    assert not [name for name in hub.sent if name.endswith((".py", ".md"))]
    hub.forget()
    again = chat(hub, tmp_path, "chat", "owner/model", "-p", "hi")
    assert again.stdout == first.stdout
    assert hub.asked == []


def test_a_download_that_broke_off_is_an_error_and_goes_on_later(hub: Hub, tmp_path: Path) -> None:
    hub.fail("drop", "/cdn/*.safetensors", after_bytes=1000, times=1)
    hub.fail("drop", "/cdn/*.safetensors")
    broken = chat(hub, tmp_path, "chat", "owner/model", "-p", "hi")
    assert broken.returncode == 1
    assert "`owner/model` cannot be fetched" in broken.stderr
    assert "Traceback" not in broken.stderr
    hub.mend()
    whole = chat(hub, tmp_path, "chat", "owner/model", "-p", "hi")
    assert whole.returncode == 0, whole.stderr
    assert hub.sent["owner/model/model.safetensors"] == (KIMI_MINI / "model.safetensors").stat().st_size


def test_a_repository_that_does_not_exist(hub: Hub, tmp_path: Path) -> None:
    done = chat(hub, tmp_path, "chat", "owner/other", "-p", "hi")
    assert done.returncode == 1
    assert "there is no repository `owner/other`" in done.stderr
