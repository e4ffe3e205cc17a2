"""What a host's process printed is complete once it has exited."""

from __future__ import annotations

import os
import queue

import pytest

from kimi_mlx.cluster.channel.host_process import HostProcess
from kimi_mlx.cluster.channel.messages import Message


@pytest.mark.parametrize("mark", [b"", b"a mark that never comes"])
def test_output_has_lines_that_are_read_after_the_exit(mark: bytes) -> None:
    ends: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    script = "(sleep 0.3; echo connection refused >&2) 1>&- & exit 255"
    process = HostProcess(0, ["sh", "-c", script], os.environ, lambda _, message: ends.put(message), mark=mark)
    assert ends.get(timeout=10) is None
    assert process.wait(10)
    assert process.output == "connection refused"
    assert process.exit_code == 255
    process.release(1)
