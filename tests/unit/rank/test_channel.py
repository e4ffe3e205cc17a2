"""A rank that cannot read its commands reports it and ends, whatever the reason."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator

import pytest

from kimi_mlx.cluster.channel.messages import decode, encode
from kimi_mlx.rank.channel import EXIT_ENDED, EXIT_FAILED, Channel


class FailingPipe(io.BytesIO):
    """A pipe that cannot be read."""

    def __iter__(self) -> Iterator[bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (io.BytesIO(b"\x00garbage\n"), "a line that is not a message"),
        (io.BytesIO(encode("cancel", request_id=1)[:-6]), "a line that is not a message"),
        (io.BytesIO(encode("patches")), "KeyError: 'digest'"),
        (io.BytesIO(encode("patches", digest="a", data=1, shape=[1])), "TypeError: "),
        (FailingPipe(), "Input/output error"),
    ],
    ids=["garbage", "truncated", "no fields", "no text", "unreadable"],
)
def test_a_broken_command_channel_is_reported(source: io.BytesIO, reason: str) -> None:
    sink = io.BytesIO()
    channel = Channel(source, sink)
    channel.start_threads()
    with pytest.raises(SystemExit):
        channel.next_command()
    deadline = time.monotonic() + 5
    while not sink.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    message = decode(sink.getvalue().splitlines()[0])
    assert message["kind"] == "failed"
    assert message["text"].startswith("cannot read its commands: ")
    assert reason in message["text"]


@pytest.mark.parametrize(("is_loading", "code"), [(False, EXIT_ENDED), (True, EXIT_FAILED)])
def test_the_guard_holds_the_sockets_of_a_rank_that_ends_while_it_loads(
    is_loading: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may be in a collective then. All ranks execute the end after the same step otherwise."""
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    channel = Channel(io.BytesIO(), io.BytesIO())
    channel.start_threads()
    while is_loading and not channel.num_received:  # the end is the last command
        time.sleep(0.01)
    with pytest.raises(SystemExit) as end:
        channel.exit_if_ending() if is_loading else channel.next_command()
    assert channel.begin_unload(end.value, 0) == code
