"""Options of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_mlx.cluster.hosts.host import local_cluster
from kimi_mlx.session.session import DEFAULT_DRAFT_TOKENS, FAST_SYNC_CHECK_EVERY, SessionOptions


@pytest.mark.parametrize(
    ("options", "check_every"),
    [
        (SessionOptions(None, ranks=2), 0),
        (SessionOptions(None, ranks=2, fast_sync=True), FAST_SYNC_CHECK_EVERY),
        (SessionOptions(None, ranks=2, fast_sync=True, check_every=100), 100),
        (SessionOptions(None, cluster=local_cluster(2, fast_sync=True)), FAST_SYNC_CHECK_EVERY),
        (SessionOptions(None, cluster=local_cluster(2), check_every=3), 3),
    ],
)
def test_the_fast_fence_keeps_checks_on(options: SessionOptions, check_every: int) -> None:
    assert options.check_every == check_every


@pytest.mark.parametrize("has_draft", [False, True])
@pytest.mark.parametrize(("speculate", "max_drafted"), [(None, None), (0, 0), (1, 1), (5, 5)])
def test_maximum_number_of_draft_tokens(has_draft: bool, speculate: int | None, max_drafted: int | None) -> None:
    folder, name = (Path("draft"), "draft") if has_draft else (None, None)
    for options in (
        SessionOptions(None, speculate=speculate, draft=folder),
        SessionOptions(None, speculate=speculate, draft_name=name),
    ):
        default = DEFAULT_DRAFT_TOKENS if has_draft else 0
        assert options.max_drafted == (default if max_drafted is None else max_drafted)
        assert options.has_draft_model == (has_draft and speculate != 0)
