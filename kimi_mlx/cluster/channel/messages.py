"""What front and ranks say to each other: one JSON object a line, in both directions.

Front to rank: `start` (once, first), `join` (where all are), then `request` (with its number), `cancel` (the number;
to the leader), `reset`; `alive` each second that has nothing else.
Rank to front: `listening` (its ports), `joined`, `tested` (what its links got wrong), `loading`, `ready`, `finished`,
`refused` (a request that cannot be served), `error` (its last word), `note` (for its log alone); `alive` each second,
with what it is doing, its steps and its links; from the leader also `text` (files of the tokenizer), `prefilled` and
`token`.
"""

from __future__ import annotations

import json
from typing import Any, cast

import kimi_mlx.errors as errors
from kimi_mlx.errors import KimiMlxError, RingError

Message = dict[str, Any]

HEARTBEAT_S = 1.0
"""How often a rank says that it is alive, from a thread of its own."""


def encode(kind: str, **fields: Any) -> bytes:
    """One line of JSON; `kind` says what it is."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The object of one line.

    Raises:
        RingError: not an object with a `kind`.
    """
    try:
        message = json.loads(line)
        if isinstance(message, dict) and "kind" in message:
            return cast(Message, message)
    except (ValueError, RecursionError):
        pass
    raise RingError(f"a rank sent a line that is no message: {line[:80]!r}")


def encode_error(error: KimiMlxError, rank: int | None, kind: str = "error", **fields: Any) -> bytes:
    """An error as a message, to be raised again by the front."""
    return encode(kind, type=type(error).__name__, message=error.message, hint=error.hint, rank=rank, **fields)


def decode_error(message: Message) -> KimiMlxError:
    """The error that a rank met, of the same class."""
    found = getattr(errors, str(message.get("type")), None)
    known = found if isinstance(found, type) and issubclass(found, KimiMlxError) else RingError
    return known(message["message"], message.get("hint"), message.get("rank"))
