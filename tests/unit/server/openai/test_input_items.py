"""Pages of the input items of a response."""

from __future__ import annotations

import pytest

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.openai.input_items import MAX_LIMIT, page_of


@pytest.mark.parametrize("limit", ["0", "-1", "101", "1999", "000000001999", "1" * 5000, "", "x", "1.5", "²"])
def test_a_limit_out_of_range_is_refused(limit: str) -> None:
    with pytest.raises(ApiError, match="`limit`: must be 1 to 100"):
        page_of({"limit": limit})


def test_limits_in_range() -> None:
    assert [page_of({"limit": limit}).limit for limit in ("1", "007", str(MAX_LIMIT))] == [1, 7, MAX_LIMIT]
