"""Fixtures for tests over ssh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts, missing_requirement


@pytest.fixture(scope="module")
def hosts_of_module() -> Iterator[Hosts]:
    """Start two hosts for all tests of a module."""
    if reason := missing_requirement():
        pytest.skip(reason)
    with Hosts() as hosts:
        yield hosts


@pytest.fixture
def hosts(hosts_of_module: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Return two healthy hosts and put an `ssh` that knows them on PATH; restore them after the test."""
    monkeypatch.setenv("PATH", hosts_of_module.path)
    yield hosts_of_module
    hosts_of_module.heal()
