"""`kimi-mlx serve` as a process, and the options that it rejects."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from kimi_mlx.errors import UsageError
from kimi_mlx.server.http.server_socket import ServerSocket
from tests.cli.test_chat import are_gone, ranks_of
from tests.command import call
from tests.processes import start
from tests.server import raw
from tests.server.raw import begin

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


class Serving:
    """The command, running.

    Args:
        arguments: arguments of the command.
        code: Python code that runs the command.
    """

    def __init__(self, *arguments: str, code: str = "from kimi_mlx.cli.app import main; main()"):
        command = [sys.executable, "-c", code, "serve", "--port", "0", *arguments]
        self.process = start(command, cwd=ROOT, text=True)
        assert self.process.stderr is not None
        self.greeting = ""
        while "try:" not in self.greeting:
            line = self.process.stderr.readline()
            assert line, self.greeting
            self.greeting += line
        self.url = re.findall(r"http://[^ /]+", self.greeting)[0]

    def ask(self, key: str | None = None) -> str:
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        with urlopen(Request(f"{self.url}/v1/chat/completions", body, headers), timeout=PATIENCE_S) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def health(self) -> int:
        return raw.request(self.port, path="/health").status

    def figures(self) -> str:
        return raw.request(self.port, path="/metrics").body.decode()

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """The exit code, and what it had still output."""
        self.process.send_signal(number)
        _, output = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output


def test_it_answers_and_shuts_down_cleanly() -> None:
    serving = Serving()
    assert "curl" in serving.greeting
    assert serving.ask().startswith("Hello!")
    long = {"logit_bias": {"1537": -100, "1538": -100}, "stream": True}
    with closing(begin(serving.port, **long)) as connection:
        assert connection.recv(100)
        code, output = serving.end(signal.SIGINT)
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    assert code == 130
    assert output.endswith("stopped\n")
    assert b'"code":"stopping"' in data
    assert b"data: [DONE]" in data
    assert re.search("127.0.0.1 POST /v1/chat/completions 200 .* stopped: the server is shutting down", output)
    assert "Traceback" not in output
    assert '"content"' not in output


@pytest.mark.slow
@pytest.mark.ranks
def test_no_rank_is_left_after_shutdown() -> None:
    serving = Serving("--ranks", "2", "--api-key", "secret", "--served-name", "gpt-4o")
    ranks = ranks_of(serving.process)
    assert len(ranks) == 2
    assert serving.ask("secret").startswith("Hello!")
    code, output = serving.end(signal.SIGTERM)
    assert (code, "Traceback" in output) == (143, False)
    assert are_gone(ranks, 10)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_client_that_has_not_sent_its_body_does_not_delay_the_end(number: signal.Signals) -> None:
    serving = Serving()
    with closing(socket.create_connection(("127.0.0.1", serving.port))) as connection:
        connection.settimeout(PATIENCE_S)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        assert serving.health() == 200  # so that one request was read as well
        serving.process.send_signal(number)
        data = connection.recv(65536)
        while more := connection.recv(65536):
            data += more
        assert data.startswith(b"HTTP/1.1 503")
        assert b"the server is shutting down" in data
        code, output = serving.end(number)
    assert code == 128 + number
    assert "Traceback" not in output


WAITING_LONG = """
import socket
from kimi_mlx.server import server
server.SHUTDOWN_S = 600

class SmallSocket(socket.socket):
    def listen(self, *backlog):  # connections inherit the size
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().listen(*backlog)

socket.socket = SmallSocket
from kimi_mlx.cli.app import main
main()
"""


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_clients_that_do_not_read() -> None:
    serving = Serving(code=WAITING_LONG)
    endless = {"logit_bias": {"1537": -100, "1538": -100}, "logprobs": True, "top_logprobs": 20, "stream": True}
    with closing(begin(serving.port, receive_bytes=4096, **endless)):
        # then several 100 kB were sent, more than the connection's buffers hold
        while float(re.findall(r"kimi_mlx_cache_tokens (\d.*)", serving.figures())[0]) < 512:
            time.sleep(0.2)
        serving.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            serving.process.wait(timeout=2)
        code, output = serving.end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in output


@pytest.mark.ranks
@pytest.mark.sweep  # over ssh it is tested always
def test_a_lost_rank_is_restarted() -> None:
    serving = Serving("--ranks", "2")
    long = {"logit_bias": {"1537": -100, "1538": -100}, "stream": True, "max_tokens": 600}
    with closing(begin(serving.port, **long)) as connection:
        connection.settimeout(PATIENCE_S)
        data = connection.recv(65536)
        while b"reasoning_content" not in data:
            data += connection.recv(65536)
        os.kill(ranks_of(serving.process)[1], signal.SIGKILL)
        states: list[int] = []
        while 503 not in states or states[-1] != 200:
            states.append(serving.health())
            time.sleep(0.05)
        before = len(data)
        while b"[DONE]" not in data:
            data += connection.recv(65536)
    assert len(data) > before
    assert b'"finish_reason":"length"' in data
    assert b'"error"' not in data
    assert "kimi_mlx_ring_restarts 1.0" in serving.figures()
    code, output = serving.end(signal.SIGTERM)
    assert code == 143
    assert output.count("lost the ring: rank 1") == 1
    assert output.count("the ring is up again after ") == 1


def test_the_network_needs_a_key() -> None:
    refused = call("serve", "--host", "0.0.0.0")
    assert refused.returncode == 2
    assert "refusing to listen on `0.0.0.0` without an API key" in refused.stderr
    assert "KIMI_MLX_API_KEY" in refused.stderr


def test_invalid_keys_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    mistakes = (
        (None, "there is no such file"),
        ("# nothing\n\n", "has no key"),
        ("one # first\none two\n", "line 2: an API key consists of"),
    )
    for text, output in mistakes:
        if text is not None:
            file.write_text(text)
        refused = call("serve", "--api-key-file", str(file))
        assert refused.returncode == 2
        assert output in refused.stderr
    assert "without spaces" in call("serve", "--api-key", "").stderr


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (("--cors-origin", "example.org"), "write `https://example.org`"),
        (("--cors-origin", "https://example.org/page"), "write `https://example.org`"),
        (("--cache-disk", "5GB"), "add `--cache-dir DIR`"),
        (("--cache-dir", "x", "--cache-disk", "5kB"), "a cache of 5000 bytes is too small"),
    ],
)
def test_invalid_options_are_rejected(arguments: tuple[str, ...], output: str) -> None:
    refused = call("serve", *arguments)
    assert refused.returncode == 2
    assert output in refused.stderr


@pytest.mark.slow
def test_the_addresses_for_other_machines_are_printed(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("se#cret # of the laptop\n")
    serving = Serving("--host", "0.0.0.0", "--api-key-file", str(keys))
    assert f"http://{socket.gethostname()}:{serving.port}" in serving.greeting
    assert "Bearer KEY" in serving.greeting
    assert serving.ask("se#cret").startswith("Hello!")
    assert raw.request(serving.port, "POST", "/chat/completions").status == 401
    code, output = serving.end(signal.SIGTERM)
    assert code == 143
    assert "127.0.0.1 POST /v1/chat/completions 401" in output
    assert "an API key is required" in output


def test_a_port_in_use_is_an_error() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        refused = call("serve", "--port", str(port))
    assert refused.returncode == 2
    assert f"port {port} of `127.0.0.1` is in use" in refused.stderr
    assert f"--port {port + 1}" in refused.stderr


def test_two_servers_cannot_bind_the_same_port() -> None:
    def take_it_too(first: ServerSocket) -> None:
        with closing(ServerSocket("127.0.0.1", first.port)) as second:  # on Linux: nobody listens yet
            first.listen()
            second.listen()

    with (
        closing(ServerSocket("127.0.0.1", 0)) as server_socket,
        pytest.raises(UsageError, match=f"port {server_socket.port} of `127.0.0.1` is in use"),
    ):
        take_it_too(server_socket)


def test_addresses_of_other_machines_are_errors() -> None:
    for host in ("203.0.113.7", "no.such.host.invalid"):
        refused = call("serve", "--host", host, "--api-key", "x")
        assert refused.returncode == 2
        assert host in refused.stderr
