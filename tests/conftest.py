"""Set-up for every test: no hub, no user settings, plain output, CPU."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

# before huggingface_hub and tokenizers are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process that a test starts compiles all modules again

import certifi
import mlx.core as mx
import pytest
from hypothesis import settings

from kimi_mlx.model.device import has_gpu
from tests import processes
from tests.examples import QUICK, THOROUGH

if TYPE_CHECKING:
    from kimi_mlx.session.session import Session
    from tests.server.running_server import RunningServer

gc.disable()  # while tests are collected, since nothing of it goes: see `pytest_collection_finish`

# Signals that were ignored by whoever started the tests (in the background, under nohup) would be ignored by all
# processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# no deadline, because the machine may be busy; the same examples in every CI run, new ones elsewhere
for profile, max_examples in (("quick", QUICK), ("thorough", THOROUGH)):  # `scripts/test --all` chooses the second
    settings.register_profile(profile, deadline=None, max_examples=max_examples, derandomize="CI" in os.environ)
settings.load_profile("quick")

PLAIN_TERMINAL = {"NO_COLOR": "1", "COLUMNS": "100", "TERM": "dumb"}


@pytest.fixture(scope="session")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data-home")


@pytest.fixture(scope="session")
def one_certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the first of certifi's certificates."""
    first, mark, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    file = tmp_path_factory.mktemp("certificates") / "one.pem"
    file.write_text(first + mark)
    return file


@pytest.fixture(autouse=True)
def surroundings(
    monkeypatch: pytest.MonkeyPatch, data_home: Path, one_certificate: Path, request: pytest.FixtureRequest
) -> None:
    """Make the surroundings of a test the same everywhere; one fixture, since each costs all tests time.

    The user's settings are hidden, and the output of Rich and Typer is plain. Chats, logs and servers of tests stay out
    of the user's folders. One certificate is trusted: a new HTTP client reads all of them, for 25 ms. Settings of MLX
    that an earlier test may have changed are reset: compilation on, CPU; this keeps tolerances valid on a Mac too, and
    tests marked `gpu` choose the device themselves.
    """
    for name in list(os.environ):
        if name.startswith(("KIMI_MLX_", "MLX_RANK", "MLX_HOSTFILE", "FORCE_COLOR")):
            monkeypatch.delenv(name)
    for name, value in PLAIN_TERMINAL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_DATA_HOME", str(data_home))
    monkeypatch.setenv("XDG_STATE_HOME", str(data_home / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(data_home / "config"))
    if request.node.get_closest_marker("network") is None:
        monkeypatch.setenv("SSL_CERT_FILE", str(one_certificate))
    mx.enable_compile()
    mx.set_default_device(mx.cpu)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def kill_started_processes() -> Iterator[None]:
    """Kill the processes that a test has started."""
    yield
    processes.end_all()


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """A session with kimi-mini, for all tests of the client, the server and the page."""
    from kimi_mlx.session.open import open_session
    from kimi_mlx.session.session import SessionOptions
    from tests.fakes import KIMI_MINI

    mx.set_default_device(mx.cpu)  # pyright: ignore[reportArgumentType]
    with closing(open_session(SessionOptions(KIMI_MINI))) as opened:
        yield opened


@pytest.fixture(scope="session")
def running(session: Session) -> Iterator[RunningServer]:
    """The server with kimi-mini."""
    from tests.server.running_server import serving  # the server's packages, which few tests need

    with serving(session) as server:
        yield server


def pytest_collection_finish() -> None:
    """Begin to collect garbage, except in what is there by now.

    A session that closes collects all garbage: in the thousands of collected tests and their packages this took longer
    than the test.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where MLX has no GPU."""
    if has_gpu():
        return
    skip = pytest.mark.skip(reason="MLX has no GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
