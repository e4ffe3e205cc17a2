"""The log file of a service: its size limit and its last lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.services.log_file import follow, last_lines, limit_log_size, older_log


def test_the_log_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    monkeypatch.setenv("KIMI_MLX_SERVICE_LOG", str(path))
    limit_log_size()
    with path.open("ab", buffering=0) as file:
        file.write(b"".join(b"line %d\n" % number for number in range(200)))
        limit_log_size(10_000)
        assert not older_log(path).exists()
        lines = follow(path, 2)
        assert [next(lines), next(lines)] == ["line 198", "line 199"]
        limit_log_size(1000)
        assert (path.stat().st_size, older_log(path).stat().st_size > 1000) == (0, True)
        file.write(b"new\nhalf")
        assert next(lines) == "new"
        file.write(b" and rest\n")
        assert next(lines) == "half and rest"
    assert path.stat().st_size == len("new\nhalf and rest\n")
    assert last_lines(path, 3) == ["line 199", "new", "half and rest"]
    assert last_lines(path, 0) == []
    assert len(last_lines(path, 10_000)) == 202
    assert last_lines(tmp_path / "none", 5) == []
    monkeypatch.setenv("KIMI_MLX_SERVICE_LOG", "")
    limit_log_size(0)
    assert path.stat().st_size > 0
