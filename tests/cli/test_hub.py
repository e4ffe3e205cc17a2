"""Models from the hub: the real client against a small hub on loopback that can interrupt downloads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_mlx.hub import retries
from tests.command import call
from tests.fakes import KIMI_MINI
from tests.hub import Hub, use

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve kimi-mini; retries hardly wait."""
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 1.0)
    with Hub({"owner/model": KIMI_MINI}) as hub:
        use(hub, tmp_path, monkeypatch)
        yield hub


def test_a_repository_is_downloaded_once_and_then_answers(hub: Hub) -> None:
    first = call("chat", "owner/model", "-p", "hi")
    assert first.returncode == 0, first.stderr
    assert not [name for name in hub.sent if name.endswith((".py", ".md"))]
    hub.reset_counts()
    again = call("chat", "owner/model", "-p", "hi")
    assert again.stdout == first.stdout
    assert hub.requests == []


def test_an_interrupted_download_is_an_error_and_is_resumed_later(hub: Hub) -> None:
    hub.fail("drop", "/cdn/*.safetensors", after_bytes=1000, times=1)
    hub.fail("drop", "/cdn/*.safetensors")
    broken = call("chat", "owner/model", "-p", "hi")
    assert broken.returncode == 1
    assert "cannot download `owner/model`" in broken.stderr
    hub.clear_faults()
    whole = call("chat", "owner/model", "-p", "hi")
    assert whole.returncode == 0, whole.stderr
    assert hub.sent["owner/model/model.safetensors"] == (KIMI_MINI / "model.safetensors").stat().st_size


def test_a_repository_that_does_not_exist(hub: Hub) -> None:
    done = call("chat", "owner/other", "-p", "hi")
    assert done.returncode == 1
    assert "repository `owner/other` does not exist" in done.stderr
