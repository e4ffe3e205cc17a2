"""Hosts for tests over real ssh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts, why_not


@pytest.fixture(scope="module")
def hosts_of_module() -> Iterator[Hosts]:
    """Two hosts for all tests of a module."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts() as hosts:
        yield hosts


@pytest.fixture
def hosts(hosts_of_module: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Two hosts that are well, and `ssh` that knows them; whatever a test does to them is undone."""
    monkeypatch.setenv("PATH", hosts_of_module.path)
    yield hosts_of_module
    hosts_of_module.heal()
