"""The link between two hosts, measured: small messages there and back, then bytes for a second.

A program of one file and the standard library alone (Python 3.8 is enough), so that it also runs on a host that has
nothing of ours: `command` is what to run there. The secret is never on a command line: it is the first line of standard
input. One process listens, as MLX's ring does, on the address to be measured, and prints a message with its port; the
other connects, as MLX's ring does, and prints a message with the figures. Both end at the time limit, and when their
input ends.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 10.0
"""By default, how long either side lives."""

HANDSHAKE_LIMIT_S = 2.0
"""How long a stranger may hold up the listener."""

SMALL_BYTES = 64
SMALL_COUNT = 200
SMALL_LIMIT_S = 0.5
"""Messages there and back; fewer if they take longer."""

BLOCK_BYTES = 1 << 18
BULK_S = 1.0
"""Blocks one way, for so long."""

NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size

PING, BLOCK, END = b"P", b"B", b"E"
"""What follows: a small message, to be sent back; a block, to be counted; nothing, and the count is sent back."""


class MeasureError(Exception):
    """The other side is not there, is a stranger, or is too slow."""


def serve(address: str, port: int, token: str, limit_s: float, announce: Callable[[int], None]) -> None:
    """Listen, answer one client that knows the token, end.

    Args:
        address: where to listen; nowhere else.
        port: 0 for any.
        token: the secret.
        limit_s: after which there is nothing left of this.
        announce: called with the port once it listens.

    Raises:
        MeasureError: nobody came, or the client went away.
        OSError: the address is not this host's, the port is taken.
    """
    deadline = time.monotonic() + limit_s
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4)
        announce(listener.getsockname()[1])
        while True:
            listener.settimeout(_left(deadline))
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if _is_known(connection, token, min(deadline, time.monotonic() + HANDSHAKE_LIMIT_S)):
                    _answer(connection, deadline)
                    return


def measure(address: str, port: int, token: str, limit_s: float) -> dict[str, float]:
    """Connect to a listener and measure.

    Returns: `round_trip_s` (median), `bytes_per_s` (one way), and how many messages and bytes that was.

    Raises:
        MeasureError: nobody answers, or without the token.
        OSError: refused, no route, connection lost, time is up.
    """
    deadline = time.monotonic() + limit_s
    with socket.create_connection((address, port), timeout=_left(deadline)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _introduce(connection, token, deadline)
        trips = _round_trips(connection, deadline)
        count, seconds = _bulk(connection, deadline)
    return {
        "round_trip_s": statistics.median(trips),
        "bytes_per_s": count / seconds,
        "messages": len(trips),
        "bytes": count,
    }


def command(python: str, role: str, address: str, port: int = 0, limit_s: float = LIMIT_S) -> list[str]:
    """What runs one side, `serve` or `measure`, with any Python."""
    source = Path(__file__).read_text(encoding="utf-8")
    side = [role, "--address", address, "--port", str(port), "--limit", str(limit_s)]
    return [python, "-I", "-u", "-c", source, *side]


def main(arguments: list[str] | None = None) -> int:
    """Run either side; the exit code is 1, and the message one of an error, if it came to nothing."""
    parser = argparse.ArgumentParser(description="Measure the link between two hosts; the secret comes on stdin.")
    parser.add_argument("role", choices=["serve", "measure"])
    parser.add_argument("--address", required=True, help="IPv4; where to listen, or whom to ask")
    parser.add_argument("--port", type=int, default=0, help="0: any, and it is printed")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds after which this ends")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGALRM, _end_at_once)  # for waits that have no limit of their own, such as standard input
    signal.setitimer(signal.ITIMER_REAL, options.limit + 1)
    try:
        token = sys.stdin.readline().strip()
        if not token:
            raise MeasureError("no secret on standard input")
        threading.Thread(target=_end_with_input, daemon=True).start()
        if options.role == "serve":
            serve(options.address, options.port, token, options.limit, lambda port: _print("listening", port=port))
        else:
            _print("measured", **measure(options.address, options.port, token, options.limit))
    except (MeasureError, OSError) as error:
        is_late = isinstance(error, socket.timeout)
        reason = getattr(error, "strerror", None) or str(error)
        _print("error", error=f"no answer within {options.limit:g} s" if is_late else reason)
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


def _proof(token: str, who: bytes, nonce: bytes) -> bytes:
    return hmac.new(token.encode(), who + nonce, hashlib.sha256).digest()


def _is_known(connection: socket.socket, token: str, deadline: float) -> bool:
    """Whether the client knows the token; if so it is shown that we do."""
    nonce = os.urandom(NONCE_BYTES)
    try:
        _send(connection, nonce, deadline)
        answer = _receive(connection, PROOF_BYTES + NONCE_BYTES, deadline)
        if not hmac.compare_digest(answer[:PROOF_BYTES], _proof(token, b"client", nonce)):
            return False
        _send(connection, _proof(token, b"server", answer[PROOF_BYTES:]), deadline)
    except (MeasureError, OSError):
        return False
    return True


def _introduce(connection: socket.socket, token: str, deadline: float) -> None:
    nonce = os.urandom(NONCE_BYTES)
    try:
        challenge = _receive(connection, NONCE_BYTES, deadline)
        _send(connection, _proof(token, b"client", challenge) + nonce, deadline)
        answer = _receive(connection, PROOF_BYTES, deadline)
    except (MeasureError, ConnectionError):
        raise MeasureError("something else listens there, or with another secret") from None
    if not hmac.compare_digest(answer, _proof(token, b"server", nonce)):
        raise MeasureError("what listens there does not know the secret")


def _answer(connection: socket.socket, deadline: float) -> None:
    """Do what the client says until it has ended the blocks."""
    block = bytearray(BLOCK_BYTES)
    count = 0
    while True:
        word = _receive(connection, 1, deadline)
        if word == PING:
            _send(connection, _receive(connection, SMALL_BYTES, deadline), deadline)
        elif word == BLOCK:
            _receive_into(connection, block, deadline)
            count += len(block)
        elif word == END:
            _send(connection, count.to_bytes(8, "big"), deadline)
            return
        else:
            raise MeasureError(f"the client sent {word!r}")


def _round_trips(connection: socket.socket, deadline: float) -> list[float]:
    message = PING + bytes(SMALL_BYTES)
    end = time.monotonic() + SMALL_LIMIT_S
    trips: list[float] = []
    while not trips or (len(trips) < SMALL_COUNT and time.monotonic() < end):
        start = time.perf_counter()
        _send(connection, message, deadline)
        _receive(connection, SMALL_BYTES, deadline)
        trips.append(time.perf_counter() - start)
    return trips


def _bulk(connection: socket.socket, deadline: float) -> tuple[int, float]:
    """Bytes sent, and the seconds until the other side had them all."""
    block = BLOCK + bytes(BLOCK_BYTES)
    start = time.perf_counter()
    count = 0
    while not count or time.perf_counter() - start < BULK_S:
        _send(connection, block, deadline)
        count += BLOCK_BYTES
    _send(connection, END, deadline)
    arrived = int.from_bytes(_receive(connection, 8, deadline), "big")
    seconds = time.perf_counter() - start
    if arrived != count:
        raise MeasureError(f"{arrived} of {count} bytes arrived")
    return count, seconds


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    connection.settimeout(_left(deadline))
    connection.sendall(data)


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray(count)
    _receive_into(connection, data, deadline)
    return bytes(data)


def _receive_into(connection: socket.socket, data: bytearray, deadline: float) -> None:
    view = memoryview(data)
    while view:
        connection.settimeout(_left(deadline))
        count = connection.recv_into(view)
        if not count:
            raise MeasureError("the other side closed the connection")
        view = view[count:]


def _left(deadline: float) -> float:
    """The seconds until then.

    Raises:
        socket.timeout: there are none, as a wait of the socket itself would say.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout("timed out")  # noqa: UP041, the same as TimeoutError only since Python 3.10
    return left


def _print(kind: str, **fields: object) -> None:
    print(json.dumps({"kind": kind, **fields}), flush=True)


def _end_at_once(number: int, frame: object) -> None:
    os._exit(1)


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
