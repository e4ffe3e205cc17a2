"""Results with arrays: their bytes are in a file, and survive it."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kimi_mlx.server.large_results import pack, unpack


def test_arrays_pass_through_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "arrays"
    first, second = np.arange(3000, dtype=np.uint8).reshape(-1, 3), np.ones((2, 2), np.uint8)
    packed = pack({"a": first, "again": first, "b": (second, "text")}, path)
    assert len(packed.data) < 1000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == first.nbytes + second.nbytes
    result: Any = unpack(packed, path)
    path.unlink()
    assert np.array_equal(result["a"], first)
    assert result["again"] is result["a"]
    assert np.array_equal(result["b"][0], second)
    assert result["b"][1] == "text"


def test_a_result_without_arrays_needs_no_file(tmp_path: Path) -> None:
    assert unpack(pack(["text", 5], tmp_path / "missing" / "x"), tmp_path / "missing" / "x") == ["text", 5]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        pack(np.zeros(5, np.uint8), tmp_path / "missing" / "x")
