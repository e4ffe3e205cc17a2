"""Measure the link between two hosts: round trips of small messages, then the rate of large ones for a second.

This program is one file and needs only the standard library of Python 3.8, so that it runs on hosts without kimi-mlx:
`command` returns the command line to run there. The secret is the first line of standard input, so that it never
appears on a command line. One process listens on the address to be measured and prints a message with its port; the
other connects and prints a message with the results, both as MLX's ring does. Both exit at the time limit, and when
their input ends.
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
"""Default time limit of either side."""

HANDSHAKE_LIMIT_S = 2.0
"""Time limit of the handshake, so that a client without the secret cannot block the server."""

SMALL_BYTES = 64
SMALL_COUNT = 200
SMALL_LIMIT_S = 0.5
"""Small messages: size, number of round trips, and the time after which no more are sent."""

BLOCK_BYTES = 1 << 18
BULK_S = 1.0
"""Large messages: size, and the time during which they are sent."""

NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size

PING, BLOCK, END = b"P", b"B", b"E"
"""Type of the next message: small (to be sent back), block (to be counted), or end (the count is sent back)."""


class MeasureError(Exception):
    """The other side is missing, does not know the secret, or is too slow."""


def serve(address: str, port: int, token: str, limit_s: float, announce: Callable[[int], None]) -> None:
    """Listen, serve one client that knows the secret, and return.

    Args:
        address: address to listen on.
        port: port to listen on; 0 for any.
        token: shared secret.
        limit_s: time limit.
        announce: called with the port once the server listens.

    Raises:
        MeasureError: the client broke the protocol or closed the connection.
        OSError: the address is not one of this host, the port is in use, or no client came in time.
    """
    deadline = time.monotonic() + limit_s
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(4)
        announce(server.getsockname()[1])
        while True:
            server.settimeout(_remaining(deadline))
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if _authenticate_client(connection, token, min(deadline, time.monotonic() + HANDSHAKE_LIMIT_S)):
                    _serve_client(connection, deadline)
                    return


def measure(address: str, port: int, token: str, limit_s: float) -> dict[str, float]:
    """Connect to a server and measure.

    Returns:
        `round_trip_s` (median), `bytes_per_s` (one way), and the number of `messages` and `bytes` sent.

    Raises:
        MeasureError: the server does not know the secret, or broke the protocol.
        OSError: connection refused or lost, no route, or time limit exceeded.
    """
    deadline = time.monotonic() + limit_s
    with socket.create_connection((address, port), timeout=_remaining(deadline)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _authenticate_to_server(connection, token, deadline)
        round_trips = _round_trips(connection, deadline)
        count, seconds = _send_blocks(connection, deadline)
    return {
        "round_trip_s": statistics.median(round_trips),
        "bytes_per_s": count / seconds,
        "messages": len(round_trips),
        "bytes": count,
    }


def command(python: str, role: str, address: str, port: int = 0, limit_s: float = LIMIT_S) -> list[str]:
    """Return the command line that runs one side, `serve` or `measure`, with any Python."""
    source = Path(__file__).read_text(encoding="utf-8")
    options = [role, "--address", address, "--port", str(port), "--limit", str(limit_s)]
    return [python, "-I", "-u", "-c", source, *options]


def main(arguments: list[str] | None = None) -> int:
    """Run either side. On failure, print an error message and return exit code 1."""
    parser = argparse.ArgumentParser(description="Measure the link between two hosts; the secret comes on stdin.")
    parser.add_argument("role", choices=["serve", "measure"])
    parser.add_argument("--address", required=True, help="IPv4 address to listen on, or to connect to")
    parser.add_argument("--port", type=int, default=0, help="port; 0: any free port, which is printed")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="time limit in seconds")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGALRM, _exit_now)  # covers waits without a limit, such as reading standard input
    signal.setitimer(signal.ITIMER_REAL, options.limit + 1)
    try:
        token = sys.stdin.readline().strip()
        if not token:
            raise MeasureError("no secret on standard input")
        threading.Thread(target=_exit_when_input_ends, daemon=True).start()
        if options.role == "serve":
            serve(options.address, options.port, token, options.limit, lambda port: _print("listening", port=port))
        else:
            _print("measured", **measure(options.address, options.port, token, options.limit))
    except (MeasureError, OSError) as error:
        is_timeout = isinstance(error, socket.timeout)
        reason = getattr(error, "strerror", None) or str(error)
        _print("error", error=f"no answer within {options.limit:g} s" if is_timeout else reason)
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


def _proof(token: str, role: bytes, nonce: bytes) -> bytes:
    return hmac.new(token.encode(), role + nonce, hashlib.sha256).digest()


def _authenticate_client(connection: socket.socket, token: str, deadline: float) -> bool:
    """Return whether the client knows the secret. If so, prove that the server knows it too."""
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


def _authenticate_to_server(connection: socket.socket, token: str, deadline: float) -> None:
    """Prove that the client knows the secret, and check that the server does."""
    nonce = os.urandom(NONCE_BYTES)
    try:
        challenge = _receive(connection, NONCE_BYTES, deadline)
        _send(connection, _proof(token, b"client", challenge) + nonce, deadline)
        answer = _receive(connection, PROOF_BYTES, deadline)
    except (MeasureError, ConnectionError):
        raise MeasureError("another program listens on this port, or it has another secret") from None
    if not hmac.compare_digest(answer, _proof(token, b"server", nonce)):
        raise MeasureError("the program that listens on this port does not know the secret")


def _serve_client(connection: socket.socket, deadline: float) -> None:
    """Handle messages until the client sends `END`."""
    block = bytearray(BLOCK_BYTES)
    count = 0
    while True:
        message_type = _receive(connection, 1, deadline)
        if message_type == PING:
            _send(connection, _receive(connection, SMALL_BYTES, deadline), deadline)
        elif message_type == BLOCK:
            _receive_into(connection, block, deadline)
            count += len(block)
        elif message_type == END:
            _send(connection, count.to_bytes(8, "big"), deadline)
            return
        else:
            raise MeasureError(f"the client sent an unknown message: {message_type!r}")


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


def _send_blocks(connection: socket.socket, deadline: float) -> tuple[int, float]:
    """Send blocks; return their bytes, and the seconds until the server had received them all."""
    block = BLOCK + bytes(BLOCK_BYTES)
    start = time.perf_counter()
    count = 0
    while not count or time.perf_counter() - start < BULK_S:
        _send(connection, block, deadline)
        count += BLOCK_BYTES
    _send(connection, END, deadline)
    received = int.from_bytes(_receive(connection, 8, deadline), "big")
    seconds = time.perf_counter() - start
    if received != count:
        raise MeasureError(f"the server received {received} of {count} bytes")
    return count, seconds


def _send(connection: socket.socket, data: bytes, deadline: float) -> None:
    connection.settimeout(_remaining(deadline))
    connection.sendall(data)


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray(count)
    _receive_into(connection, data, deadline)
    return bytes(data)


def _receive_into(connection: socket.socket, data: bytearray, deadline: float) -> None:
    view = memoryview(data)
    while view:
        connection.settimeout(_remaining(deadline))
        count = connection.recv_into(view)
        if not count:
            raise MeasureError("the other side closed the connection")
        view = view[count:]


def _remaining(deadline: float) -> float:
    """Return the seconds until the deadline.

    Raises:
        socket.timeout: the deadline has passed; a socket's own wait raises the same.
    """
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise socket.timeout("timed out")  # noqa: UP041, an alias of TimeoutError only since Python 3.10
    return remaining


def _print(kind: str, **fields: object) -> None:
    prefix = os.environ.get("KIMI_MLX_PREFIX", "")  # see kimi_mlx.cluster.channel.messages
    sys.stdout.write(f"{prefix}{json.dumps({'kind': kind, **fields})}\n")  # at once: others may write there too
    sys.stdout.flush()


def _exit_now(number: int, frame: object) -> None:
    os._exit(1)


def _exit_when_input_ends() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
