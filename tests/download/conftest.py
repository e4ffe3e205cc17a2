"""Checkpoints, hubs that serve them, and hosts that download them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.download.host import NAME, Checksums, Expected, Host, built_from_folder, make_large, make_small, succeed
from tests.hub import Hub


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_large(tmp_path_factory.mktemp("large") / "model")


@pytest.fixture(scope="session")
def expected_small(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return _expected(small, tmp_path_factory)


@pytest.fixture(scope="session")
def expected_large(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return _expected(large, tmp_path_factory)


def _expected(repository: Path, folders: pytest.TempPathFactory) -> Expected:
    @cache
    def build(ranks: int) -> Checksums:
        return built_from_folder(repository, folders.mktemp("expected"), ranks)

    return build


@pytest.fixture
def hub(small: Path) -> Iterator[Hub]:
    with Hub({NAME: small}) as server:
        yield server


@pytest.fixture
def large_hub(large: Path) -> Iterator[Hub]:
    with Hub({NAME: large}) as server:
        yield server


@pytest.fixture
def host(hub: Hub, tmp_path: Path) -> Host:
    return Host(hub, tmp_path / "host")


@pytest.fixture
def large_host(large_hub: Hub, tmp_path: Path) -> Host:
    return Host(large_hub, tmp_path / "host")


@pytest.fixture(scope="session")
def finished(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home folder of a host with the stores of both ranks; tests copy it."""
    home = tmp_path_factory.mktemp("finished") / "host"
    with Hub({NAME: small}) as hub:
        succeed(Host(hub, home).run("download", NAME, "--ranks", "2"))
    return home


@pytest.fixture
def stored(hub: Hub, finished: Path, tmp_path: Path) -> Host:
    """A host with the stores of both ranks."""
    shutil.copytree(finished, tmp_path / "stored")
    return Host(hub, tmp_path / "stored")
