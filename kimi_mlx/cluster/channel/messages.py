"""Messages between the front and the ranks: one JSON object per line, in both directions.

Front to rank: `start` (once, first), `join` (addresses of all ranks), then `request` (with its id), `cancel` (the id),
`reset`; `alive` every second in which nothing else is sent. To rank 0 alone, before a request with images, `patches`
(parts of the patches of an image), and later `drop_patches`. The end of the messages tells a rank to end, after the
same step as the others; `lost` tells it not to wait for them.
Rank to front: `listening` (its ports), `joined`, `tested` (errors on its links), `loading`, `ready`, `finished`,
`refused` (a request that cannot be served), `note` (only for its log); `alive` every second, with its current work,
its steps, its links and its memory; from the leader also `tokenizer_files`, `encoded`, `prefilled`,
`prompt_logprobs` and `token`.
About its end: `end_limit` (seconds that the end may take, whenever this changes), `error` (one of our errors) or
`failed` (any other reason, as text that follows the name of the rank), `unloading` and `unloaded` (bytes held);
last, from its guard, `exited` (exit code).
On a host that is reached over ssh, each message to the front begins with a random prefix (`own_prefix`). Lines without
it are not ours, but of a job that the login shell left in the background.
"""

from __future__ import annotations

import json
import os
from typing import Any, cast

import kimi_mlx.errors as errors
from kimi_mlx.cluster.hosts.marked_script import PREFIX_VARIABLE
from kimi_mlx.errors import KimiMlxError, RingError

Message = dict[str, Any]

HEARTBEAT_S = 1.0
"""Interval of a rank's `alive` messages, which a separate thread sends."""


def encode(kind: str, **fields: Any) -> bytes:
    """Encode a message of a kind as one line of JSON."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"


def own_prefix() -> bytes:
    """Return what this process writes before each message to the front; empty if the front is on this host."""
    return os.environ.get(PREFIX_VARIABLE, "").encode()


def decode(line: bytes) -> Message:
    """Decode one line.

    Raises:
        RingError: the line is not an object with a `kind`.
    """
    try:
        message = json.loads(line)
        if isinstance(message, dict) and "kind" in message:
            return cast(Message, message)
    except (ValueError, RecursionError):
        pass
    raise RingError(f"a line that is not a message: {line[:80]!r}")


def encode_error(error: KimiMlxError, rank: int | None, kind: str = "error", **fields: Any) -> bytes:
    """Encode an error as a message, from which the front raises it again."""
    return encode(kind, type=type(error).__name__, message=error.message, hint=error.hint, rank=rank, **fields)


def decode_error(message: Message) -> KimiMlxError:
    """Return the error of a rank, of the same class if that is one of ours, else a RingError."""
    value = getattr(errors, str(message.get("type")), None)
    error_class = value if isinstance(value, type) and issubclass(value, KimiMlxError) else RingError
    return error_class(message["message"], message.get("hint"), message.get("rank"))
