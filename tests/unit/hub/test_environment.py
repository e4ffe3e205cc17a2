"""Broken environment variables: named with the character, and never explained as a broken network."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_mlx.errors import KimiMlxError, UsageError, WeightsError
from kimi_mlx.hub import environment, environment_check
from kimi_mlx.hub.client import fetch_checkpoint, look_up, read_range
from kimi_mlx.hub.error_messages import disk_error, hub_error
from tests.hub import Hub

VARIABLES = (
    *("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_ENDPOINT", "https://hf-mirror.com ", r"`HF_ENDPOINT` contains a space, at position 22 of 22"),
        ("HF_ENDPOINT", '"https://hf-mirror.com"', r'`HF_ENDPOINT` contains `"`, at position 1 of 23'),
        ("HF_ENDPOINT", "hf-mirror.com", "`HF_ENDPOINT` is `hf-mirror.com`, not an address"),
        ("HF_ENDPOINT", "https://host:port", "`HF_ENDPOINT` is `https://host:port`, not an address"),
        ("HF_ENDPOINT", "", "`HF_ENDPOINT` is ``, not an address"),
        ("HF_ENDPOINT", "http://a..b", "`HF_ENDPOINT` is `http://a..b`, not an address"),
        ("HF_ENDPOINT", "http://host?a=b", r"`HF_ENDPOINT` is `http://host\?a=b`, not an address"),
        ("HF_ENDPOINT", "http://host#x", "`HF_ENDPOINT` is `http://host#x`, not an address"),
        ("HF_ENDPOINT", "http://me:pa@ss#pass@host", "`HF_ENDPOINT` is `http://host`, not an address"),
        ("HF_TOKEN", "h" * 70_000, "the token in `HF_TOKEN` has 70000 characters, more than 8000"),
        ("HTTP_PROXY", "http://me:x@pass#@127.0.0.1:1", "`HTTP_PROXY` is not .*: `http://127.0.0.1:1`$"),
        ("HTTP_PROXY", "http://me:1/pass@127.0.0.1:1", "`HTTP_PROXY` is not .*: `http://127.0.0.1:1`$"),
        ("HTTP_PROXY", "me:x@pass@host:1", "`HTTP_PROXY` is not .*: `host:1`$"),
        ("HF_TOKEN", "hf_abc\nhf_def", r"`HF_TOKEN` contains a newline \(U\+000A\), at position 7 of 13"),
        ("HF_TOKEN", "“hf_abc”", r"`HF_TOKEN` contains `“` \(U\+201C\), at position 1 of 8"),
        ("HF_TOKEN", "'hf_abc'", "`HF_TOKEN` contains `'`, at position 1 of 8"),
        ("HUGGING_FACE_HUB_TOKEN", "hf_äbc", r"`HUGGING_FACE_HUB_TOKEN` contains `ä` \(U\+00E4\)"),
        ("HF_TOKEN", "Bearer hf_abc", "`HF_TOKEN` contains a space, at position 7 of 13"),
        ("HTTPS_PROXY", "socks://localhost:1080", "`HTTPS_PROXY` is not the address of a proxy that can be used"),
        ("ALL_PROXY", "socks4://localhost:1080", "`ALL_PROXY` is not the address of a proxy that can be used"),
        ("https_proxy", "http://me:pass#word@host:1", "`https_proxy` is not the address .*: `http://host:1`"),
        ("HTTP_PROXY", "http://host:port", "`HTTP_PROXY` is not the address of a proxy"),
        ("HTTPS_PROXY", "'http://host:1'", "`HTTPS_PROXY` contains `'`, at position 1 of 15"),
        ("HTTPS_PROXY", "http://host:1\n", r"`HTTPS_PROXY` contains a newline \(U\+000A\), at position 14 of 14"),
        ("SSL_CERT_FILE", "/no/such.pem", "`SSL_CERT_FILE` is `/no/such.pem`, but there is no such file"),
        ("SSL_CERT_FILE", '"/etc/hosts"', '`SSL_CERT_FILE` contains `"`, at position 1 of 12'),
        ("SSL_CERT_FILE", "/etc/hosts", "`SSL_CERT_FILE`: cannot read certificates from `/etc/hosts`"),
        ("SSL_CERT_DIR", "/no/such", "`SSL_CERT_DIR` is `/no/such`, but there is no such folder"),
        ("SSLKEYLOGFILE", "/no/such/keys", "`SSLKEYLOGFILE` is `/no/such/keys`, which cannot be written"),
        ("HF_HUB_USER_AGENT_ORIGIN", "münchen", r"`HF_HUB_USER_AGENT_ORIGIN` contains `ü` \(U\+00FC\)"),
    ],
)
def test_a_broken_variable_is_named(variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=message) as raised:
        environment_check.check_settings()
    assert "network" not in f"{raised.value.message} {raised.value.hint}"
    assert "pass" not in raised.value.message


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_HOME", "", "`HF_HOME` is ``, which is not a folder"),
        ("HF_HOME", "'/data/hf'", "`HF_HOME` contains `'`, at position 1 of 10"),
        ("HF_HOME", "/data/hf\n", r"`HF_HOME` contains a newline \(U\+000A\), at position 9 of 9"),
        ("HF_HOME", "/data/hf ", "`HF_HOME` contains a space, at position 9 of 9"),
        ("HF_HUB_CACHE", "$NO_SUCH_VARIABLE/hub", r"`HF_HUB_CACHE` is `\$NO_SUCH_VARIABLE/hub`, which is not a folder"),
        ("HF_HUB_CACHE", "~nouser/x", "`HF_HUB_CACHE` is `~nouser/x`, which is not a folder"),
        ("HF_HOME", "~nouser/x", "`HF_HOME` is `~nouser/x`, which is not a folder"),
        ("XDG_CACHE_HOME", "~nouser/x", "`XDG_CACHE_HOME` is `~nouser/x`, which is not a folder"),
        ("HF_ENDPOINT", "http://127.0.0.1:99999", "`HF_ENDPOINT` is `http://127.0.0.1:99999`, not an address"),
        ("HF_ENDPOINT", "http://127.0.0.1:abc", "`HF_ENDPOINT` is `http://127.0.0.1:abc`, not an address"),
        ("HF_ENDPOINT", "http://[::1", r"`HF_ENDPOINT` is `http://\[::1`, not an address"),
        ("HF_ENDPOINT", "http://127.0.0.1:1 ", "`HF_ENDPOINT` contains a space, at position 19 of 19"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "10s", "`HF_HUB_DOWNLOAD_TIMEOUT` is `10s`, not a number of seconds"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "9" * 20, "`HF_HUB_DOWNLOAD_TIMEOUT` is `9*`, not a number of seconds"),
        ("HF_HUB_ETAG_TIMEOUT", "-1", "`HF_HUB_ETAG_TIMEOUT` is `-1`, not a number of seconds"),
    ],
)
def test_a_broken_folder_or_number_is_named(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=message):
        environment.hub_cache()


def test_valid_values_are_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificates = ssl.get_default_verify_paths()
    for variable, value in {
        "HF_ENDPOINT": "https://hf-mirror.com/",
        "HF_TOKEN": "hf_abc-DEF.123_=\r\n",
        "HF_HOME": "~/my models/ü",
        "HTTPS_PROXY": "http://me:p%40ss@proxy.example.com:3128",
        "ALL_PROXY": "socks5h://127.0.0.1:1080",
        "http_proxy": "localhost:8080",
        "NO_PROXY": "localhost,127.0.0.1,::1,.example.com,10.0.0.0/8",
        "SSLKEYLOGFILE": str(tmp_path / "keys"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "30",
    }.items():
        monkeypatch.setenv(variable, value)
    if certificates.cafile:
        monkeypatch.setenv("SSL_CERT_FILE", certificates.cafile)
    environment_check.check_settings()
    assert environment.hub_cache()


@pytest.mark.parametrize("kind", ["file in its path", "loop"])
def test_the_variable_of_a_broken_token_path_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    if kind == "loop":
        path.symlink_to(path)
    else:
        path.touch()
        path /= "x"
    monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(path))
    with pytest.raises(UsageError, match=f"token's file `{path}` cannot be read") as raised:
        environment_check.check_settings()
    assert "its path comes from HF_TOKEN_PATH" in (raised.value.hint or "")


def test_a_loop_of_links_in_place_of_the_home_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    monkeypatch.setenv("HF_HOME", str(loop))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(loop))
    with pytest.raises(UsageError, match=f"`HF_HOME` is `{loop}`, but `{loop}` is a loop of links"):
        environment_check.check_settings()


def test_a_broken_link_in_place_of_the_home_is_named_when_a_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.symlink_to(tmp_path / "unplugged")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    with pytest.raises(UsageError, match=f"`HF_HOME` is `{home}`, but `{home}` is a broken link"):
        raise disk_error(FileExistsError(17, "File exists"), home / "hub" / "blob")


@pytest.mark.parametrize("kind", ["folder", "binary", "quotes"])
def test_a_broken_token_file_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(path))
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe" if kind == "binary" else b'"hf_abc"\n')
    with pytest.raises(UsageError, match='contains `"`' if kind == "quotes" else "cannot be read") as raised:
        environment_check.check_token()
    assert str(path) in raised.value.message


@pytest.mark.parametrize("token", ["hf_\nbad", "“hf_x”", '"hf_x"'])
def test_a_broken_token_is_the_reason_of_a_failed_request(
    hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_x"
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match="`HF_TOKEN` contains "):
        look_up("owner/model")


def test_a_rejected_token_is_named_with_its_source(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_good"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_bad")
    with pytest.raises(WeightsError, match=f"rejected your token .* from `{tmp_path}/home/token`"):
        look_up("owner/model")


class SocksServer:
    """A SOCKS5 server without authentication, on loopback; a context manager. Source: RFC 1928."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"socks5://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def __enter__(self) -> SocksServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            _, num_methods = client.recv(2)
            client.recv(num_methods)
            client.sendall(b"\5\0")
            _, _, _, kind = client.recv(4)
            host = socket.inet_ntoa(client.recv(4)) if kind == 1 else client.recv(client.recv(1)[0]).decode()
            port = int.from_bytes(client.recv(2), "big")
            with socket.create_connection((host, port)) as server:
                client.sendall(b"\5\0\0\1\0\0\0\0\0\0")
                back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                back.start()
                _copy(client, server)
                back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


@pytest.fixture
def fresh_session() -> Iterator[None]:
    """Let huggingface_hub read the proxies' variables again, now and after the test."""
    from huggingface_hub import close_session

    close_session()
    yield
    close_session()


@pytest.mark.usefixtures("fresh_session")
def test_a_dead_proxy_of_the_storage_only_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    repository = look_up("owner/model")
    monkeypatch.setattr("kimi_mlx.hub.retries.MAX_WAIT_S", 0.0)
    message = "cannot connect to `http://localhost:.*through the proxy .* of HTTP_PROXY"
    with pytest.raises(WeightsError, match=message) as raised:
        read_range(repository, "tiktoken.model", 0, 10)
    assert "the proxy `http://127.0.0.1:1` of HTTP_PROXY" in (raised.value.hint or "")


def test_an_address_below_a_hub_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/sub")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"{hub.url}/sub")
    with pytest.raises(WeightsError, match="status 404") as raised:
        look_up("owner/model")
    assert "check HF_ENDPOINT" in (raised.value.hint or "")


@pytest.mark.usefixtures("fresh_session")
def test_a_socks_proxy_works(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with SocksServer() as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        fetch_checkpoint(look_up("owner/model"))
    assert proxy.connections > 0


@pytest.mark.usefixtures("fresh_session")
@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks5h://127.0.0.1:9"])
def test_an_unreachable_proxy_is_named(hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", address)
    with pytest.raises(KimiMlxError, match=f"through the proxy `{address}` of HTTP_PROXY") as raised:
        look_up("owner/model")
    assert address in (raised.value.hint or "")


@pytest.mark.usefixtures("fresh_session")
@pytest.mark.parametrize("variable", ["ALL_PROXY", "SSL_CERT_FILE"])
def test_a_client_that_cannot_be_made_is_explained(hub: Hub, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "socks://127.0.0.1:9" if variable == "ALL_PROXY" else "/no/such.pem")
    with pytest.raises(UsageError, match=f"`{variable}`"):
        look_up("owner/model")


def test_a_number_that_breaks_the_import_is_named() -> None:
    code = "from kimi_mlx.hub.client import find_local; find_local('a/b')"
    variables = {**os.environ, "HF_HUB_ETAG_TIMEOUT": "ten"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert "UsageError: `HF_HUB_ETAG_TIMEOUT` is `ten`" in done.stderr


class FixedServer:
    """A server that gives every connection the same answer; a context manager.

    Args:
        answer: bytes to send.
        context: TLS, if any.
    """

    def __init__(self, answer: bytes, context: ssl.SSLContext | None = None) -> None:
        self._answer, self._context = answer, context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> FixedServer:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(client, server_side=True) if self._context else client as stream:
                    stream.recv(4096)
                    stream.sendall(self._answer)
            except OSError:
                continue


@pytest.mark.usefixtures("fresh_session")
@pytest.mark.parametrize(
    ("variable", "scheme", "endpoint", "message", "hint"),
    [
        ("HTTP_PROXY", "http", "http", "`http://.*` of HTTP_PROXY requires a login", "password into HTTP_PROXY"),
        ("HTTPS_PROXY", "http", "https", "`http://.*` of HTTPS_PROXY .407 Proxy", "password into HTTPS_PROXY"),
        ("HTTPS_PROXY", "https", "https", "no secure connection to", "`http://`: change HTTPS_PROXY"),
    ],
)
def test_a_proxy_that_refuses_is_named(
    hub: Hub,
    variable: str,
    scheme: str,
    endpoint: str,
    message: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with FixedServer(answer) as proxy:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"{endpoint}://hub.invalid")
        monkeypatch.setenv(variable, f"{scheme}://me:secret@127.0.0.1:{proxy.port}")
        with pytest.raises(WeightsError, match=message) as raised:
            look_up("owner/model")
    assert hint in (raised.value.hint or "")
    assert "secret" not in f"{raised.value.message} {raised.value.hint}"


@pytest.mark.usefixtures("fresh_session")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the client does not close the socket
def test_a_proxy_of_another_kind_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with FixedServer(b"HTTP/1.1 400 Bad Request\r\n\r\n") as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5://127.0.0.1:{proxy.port}")
        with pytest.raises(WeightsError, match="of ALL_PROXY does not speak SOCKS5") as raised:
            look_up("owner/model")
    assert raised.value.hint == "check ALL_PROXY, then run the same command again"
    del raised
    gc.collect()


@pytest.mark.usefixtures("fresh_session")
@pytest.mark.parametrize("is_known", [False, True])
def test_an_unknown_certificate_is_explained(
    hub: Hub, tmp_path: Path, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    command = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *name)
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nX-Error-Code: RepoNotFound\r\n\r\n"
    with FixedServer(answer, context) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"https://localhost:{server.port}")
        monkeypatch.setenv("SSL_CERT_FILE" if is_known else "REQUESTS_CA_BUNDLE", str(certificate))
        with pytest.raises(
            WeightsError, match="does not exist on" if is_known else "CERTIFICATE_VERIFY_FAILED"
        ) as raised:
            look_up("owner/model")
    hint = "check the spelling" if is_known else "REQUESTS_CA_BUNDLE is not used here: set SSL_CERT_FILE"
    assert hint in (raised.value.hint or "")


def test_a_file_in_place_of_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(file / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(file / "hub"))
    with pytest.raises(UsageError, match=f"`HF_HUB_CACHE` is `{file}/hub`, but `{file}` is a file"):
        environment_check.check_settings()


@pytest.mark.parametrize(
    ("reason", "variables", "hint"),
    [
        (
            "CERTIFICATE_VERIFY_FAILED] IP address mismatch, certificate is not valid for '1.2.3.4'",
            {},
            "another server",
        ),
        ("CERTIFICATE_VERIFY_FAILED] certificate has expired", {"REQUESTS_CA_BUNDLE": "x"}, "check the clock"),
        ("CERTIFICATE_VERIFY_FAILED] certificate is not yet valid", {}, "check the clock"),
        (
            "CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate",
            {"SSL_CERT_DIR": "."},
            "SSL_CERT_DIR (`.`)",
        ),
        ("CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate", {}, "set SSL_CERT_FILE"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required", {}, "refuses this client"),
        ("TLSV1_ALERT_PROTOCOL_VERSION] tlsv1 alert protocol version", {}, "refuses this client"),
        (
            "WRONG_VERSION_NUMBER] wrong version number",
            {"HF_ENDPOINT": "https://127.0.0.1:1"},
            "`http://` in HF_ENDPOINT",
        ),
    ],
)
def test_each_fault_of_a_certificate_has_its_own_hint(
    reason: str, variables: dict[str, str], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = hub_error(OSError(f"[SSL: {reason}"), "owner/model")
    assert hint in (error.hint or "")
