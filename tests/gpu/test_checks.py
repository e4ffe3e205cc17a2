"""The checks of `kimi-mlx doctor --gpu` in full size, on the GPU."""

from __future__ import annotations

import pytest

from kimi_mlx.gpu_check.checks import CHECKS, Check
from kimi_mlx.gpu_check.report import check_lines
from kimi_mlx.gpu_check.runner import run_check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_check_passes_on_the_gpu(check: Check) -> None:
    result = run_check(check, "gpu", "full")
    assert result.state in ("ok", "skipped"), "\n".join(check_lines(result))
