"""A server with a scripted model for a foreign client, and what the client sends to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.server import server as server_module
from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from tests.clients.recorder import ClientServer, Recorder
from tests.scripted_model import Answer, write_scripted_model
from tests.server.running_server import serving


@pytest.fixture
def serve_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ClientServer]]:
    """A function that serves a model with the given answers until the end of the test."""
    recorder, build_app = Recorder(), server_module.build_app

    def build_recording_app(*args: Any, **options: Any) -> Any:
        return recorder.around(build_app(*args, **options))

    monkeypatch.setattr(server_module, "build_app", build_recording_app)
    with ExitStack() as stack:

        def serve(answers: Sequence[Answer], aliases: Sequence[str] = ("mini",)) -> ClientServer:
            folder = write_scripted_model(tmp_path / "scripted", answers)
            session = stack.enter_context(closing(open_session(SessionOptions(folder))))
            running = stack.enter_context(serving(session, folder=folder, aliases=aliases))
            return ClientServer(running.url, recorder)

        yield serve
