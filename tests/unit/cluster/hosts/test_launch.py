"""Command, environment and processor of a rank, and its messages."""

from __future__ import annotations

import sys

import pytest

from kimi_mlx.cluster.channel.messages import decode, decode_error, encode, encode_error
from kimi_mlx.cluster.hosts.launch import cpu_for_rank, rank_command, without_ring_variables
from kimi_mlx.errors import EngineError, RingError


def test_variables_of_another_ring_are_removed() -> None:
    base = {"PATH": "/bin", "MLX_RANK": "7", "MLX_JACCL_COORDINATOR": "a:1", "MLX_WORLD_SIZE": "9"}
    assert without_ring_variables(base) == {"PATH": "/bin"}


def test_rank_runs_in_the_given_python() -> None:
    command = rank_command("a.module", "/usr/bin/my python")
    assert command[:3] == ["/usr/bin/my python", "-u", "-c"]
    assert "from a.module import main; main()" in command[3]
    assert rank_command("a.module")[0] == sys.executable


@pytest.mark.parametrize(
    ("rank", "world_size", "available", "expected"),
    [(0, 2, [0, 1], 0), (1, 2, [5, 3], 5), (2, 3, [0, 1], None), (0, 1, [0, 1], None), (0, 2, None, None)],
)
def test_each_rank_has_its_own_processor(
    rank: int, world_size: int, available: list[int] | None, expected: int | None
) -> None:
    assert cpu_for_rank(rank, world_size, available) == expected


def test_messages_and_errors_are_decoded_as_they_were_encoded() -> None:
    assert decode(encode("token", id=5)) == {"kind": "token", "id": 5}
    error = decode_error(decode(encode_error(EngineError("too long", hint="shorten it"), rank=1)))
    assert (type(error), error.message, error.hint, error.rank) == (EngineError, "too long", "shorten it", 1)


@pytest.mark.parametrize("line", [b"", b"nonsense\n", b"[1]\n", b'{"a": 1}\n', b"\xff\xfe\n"])
def test_line_that_is_not_a_message_is_an_error(line: bytes) -> None:
    with pytest.raises(RingError, match="not a message"):
        decode(line)


def test_unknown_error_class_becomes_a_ring_error() -> None:
    unknown = decode(encode("error", type="SystemExit", message="m", hint=None, rank=0))
    assert type(decode_error(unknown)) is RingError
