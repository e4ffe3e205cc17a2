"""Services under systemd: the unit, and its quoting."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import ServiceError, UsageError
from kimi_mlx.services.service import Service
from kimi_mlx.services.systemd import UserUnits, quote, unquote

TRICKY = """%h $HOME ${X} "quoted" 'single' \\ back \\n ; # é \u3042"""
WORDS = st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=20))


@given(WORDS)
def test_quoted_words_are_read_back(words: list[str]) -> None:
    assert unquote(" ".join(map(quote, words))) == words


def test_unit(tmp_path: Path) -> None:
    command = (shutil.which("true") or "/bin/true", "serve", TRICKY, "", "--a=b c")
    service = Service("k2", command, {"HF_HOME": TRICKY, "PATH": "/bin"}, tmp_path / "a %h b")
    units = UserUnits(tmp_path)
    units.path("k2").write_text(units.render(service))
    assert units.path("k2").name == "kimi-mlx-k2.service"
    assert units.names() == ["k2"]
    assert units.read("k2") == service
    text = units.render(service)
    assert 'ExecStart=:"/' in text
    assert "StandardOutput=append:" in text
    assert "%%h b" in text
    assert "SuccessExitStatus=130 143" in text
    if shutil.which("systemd-analyze") is not None:
        done = subprocess.run(["systemd-analyze", "verify", "--user", units.path("k2")], capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if "k2" in line]
        assert not lines, done.stderr


def test_an_edited_unit_is_not_understood(tmp_path: Path) -> None:
    units = UserUnits(tmp_path)
    assert units.read("x") is None
    units.path("x").write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(ServiceError, match="not a service of kimi-mlx"):
        units.read("x")


@pytest.mark.parametrize("name", ["", "A", "a b", "../x", "a/b", "-a", "a" * 41, "é"])
def test_invalid_names(name: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        Service(name, ("/bin/true",), {}, Path("/log"))


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        Service("x", ("/bin/true", os.fsdecode(b"caf\xe9")), {}, Path("/log"))


def test_control_characters_are_refused() -> None:
    with pytest.raises(UsageError, match="control characters"):
        Service("x", ("/bin/true", "a\nExecStartPre=rm"), {}, Path("/log"))
    with pytest.raises(UsageError, match="control characters"):
        Service("x", ("/bin/true",), {"A": "b\n"}, Path("/log"))
