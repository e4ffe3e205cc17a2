"""Images by URL: allowed hosts and addresses, redirects, limits and faults, with a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kimi_mlx.errors import UsageError
from kimi_mlx.server import remote_images
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.message_content import RemoteUrl
from kimi_mlx.server.remote_images import ImageFetcher, normalize_host
from tests.server.picture_server import IMAGE, PictureServer, serving_pictures

PLACE = "messages[0].content[1]"


@pytest.fixture
def server() -> Iterator[PictureServer]:
    with serving_pictures() as opened:
        yield opened


def fetch(fetcher: ImageFetcher, *urls: str) -> dict[str, bytes]:
    return asyncio.run(fetcher.fetch([RemoteUrl(url, PLACE) for url in urls]))


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a 400 with the place of the image."""
    with pytest.raises(ApiError, match=message) as error:
        yield
    assert (error.value.status, error.value.param) == (400, PLACE)
    assert error.value.message.startswith(f"`{PLACE}`: ")


def test_images_are_fetched_from_the_address_of_an_allowed_host(server: PictureServer) -> None:
    first, second = server.url("image/1?size=2&x=%20y"), server.url("image/2", "Other.Example.")
    assert fetch(server.fetcher(), first, second, first) == {first: IMAGE, second: IMAGE}
    assert sorted(path for path, _ in server.requests) == ["/image/1?size=2&x=%20y", "/image/2"]
    (headers,) = [headers for path, headers in server.requests if path.startswith("/image/1")]
    assert headers["host"] == f"pictures.example:{server.server_port}"
    assert not {"cookie", "authorization", "referer"} & set(headers)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://evil.example/x.png", r"does not fetch images from `evil.example`; send it as a data URL"),
        ("http://pictures.example/x.png", "does not fetch"),  # without the port
        ("http://pictures.example:1/x.png", "does not fetch"),
        ("http://pictures.example.evil.example/x.png", "does not fetch"),
        ("http://user:secret@pictures.example/x.png", "no user name or password"),
        ("http://pictures.example:0@evil.example/x.png", "no user name or password"),
        ("http://pictures.example\\@evil.example/x.png", "no user name or password"),
        ("http:///x.png", "must have a host"),
        ("http://pictures.example:99999999/", "does not fetch|not a valid URL"),
        ("http://pictures.example/\r\nx: y", "not a valid URL"),
        ("file:///etc/passwd", "`file` URLs are not supported"),
        ("ftp://pictures.example/x.png", "`ftp` URLs are not supported"),
        ("ms://file-123", "`ms` URLs are not supported"),
        ("blob:http://pictures.example/1234", "`blob` URLs are not supported"),
        ("iVBORw0KGgoAAAANSUhEUgAA", "not a URL; send it as a data URL"),
        ("", "not a URL"),
        ("pictures.example/x.png", "not a URL"),
        ("http://" + "x" * 100_000, "not a valid URL"),
        ("http://[::1/", "does not fetch|not a valid URL"),
    ],
)
def test_urls_that_are_not_allowed(server: PictureServer, url: str, message: str) -> None:
    started = time.monotonic()
    with refused(message):
        fetch(server.fetcher(), server.url("image"), url)
    assert time.monotonic() - started < 2
    assert server.requests == []  # all URLs are checked before the first one is fetched


def test_a_port_after_an_ipv6_address_is_not_part_of_another_address(server: PictureServer) -> None:
    hosts = [normalize_host("[2606:2800::1]:443")]
    with refused("this server does not fetch images from `\\[2606:2800::1:443\\]`"):
        fetch(ImageFetcher(hosts, 100, lambda name, port: ["127.0.0.1"]), "https://[2606:2800::1:443]/a.png")


def test_without_allowed_hosts_no_url_is_fetched() -> None:
    with refused("this server does not fetch images from URLs; send it as a data URL"):
        fetch(ImageFetcher(), "https://upload.wikimedia.org/x.png")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fd00:ec2::254", "64:ff9b::7f00:1"],
)
def test_a_host_whose_addresses_are_not_public_is_refused(server: PictureServer, address: str) -> None:
    fetcher = ImageFetcher(["pictures.example"], 10**6, lambda name, port: [address])
    with refused("the host `pictures.example` has no public address"):
        fetch(fetcher, "http://pictures.example/image")


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "127.1", "[::ffff:127.0.0.1]", "localhost"])
def test_an_allowed_host_of_this_machine_is_still_refused(server: PictureServer, host: str) -> None:
    fetcher = ImageFetcher([normalize_host(f"{host}:{server.server_port}")], 10**6)
    with refused("has no public address|not a valid URL"):
        fetch(fetcher, server.url("image", host))
    assert server.requests == []


def test_a_name_is_resolved_once_and_that_address_is_used(server: PictureServer) -> None:
    answers = [["93.184.216.34"], ["127.0.0.1"]]  # DNS rebinding: the second answer is this machine
    asked: list[str] = []
    checked: list[str] = []

    def resolve(name: str, port: int) -> list[str]:
        asked.append(name)
        return answers[len(asked) - 1]

    def is_public(address: str) -> bool:
        checked.append(address)
        return False

    hosts = [f"pictures.example:{server.server_port}"]
    with refused("has no public address"):
        fetch(ImageFetcher(hosts, 10**6, resolve, is_public), server.url("image"))
    assert (asked, checked) == (["pictures.example"], ["93.184.216.34"])


def test_only_public_addresses_of_several_are_used(server: PictureServer) -> None:
    addresses = ["10.0.0.1", "127.0.0.1"]
    hosts = [f"pictures.example:{server.server_port}"]
    fetcher = ImageFetcher(hosts, 10**6, lambda name, port: addresses, lambda address: address == "127.0.0.1")
    assert fetch(fetcher, server.url("image")) == {server.url("image"): IMAGE}


def test_the_next_address_is_used_if_one_cannot_be_reached(server: PictureServer) -> None:
    fetcher = server.fetcher(resolve=lambda name, port: ["127.0.0.2", "127.0.0.1"])
    assert fetch(fetcher, server.url("image")) == {server.url("image"): IMAGE}


def test_redirects_lead_to_allowed_hosts_only(server: PictureServer) -> None:
    relative, absolute = server.url("redirect//image"), server.url(f"redirect/{server.url('image', 'other.example')}")
    assert fetch(server.fetcher(), relative, absolute) == {relative: IMAGE, absolute: IMAGE}
    for target, message in (
        ("http://evil.example/x.png", "does not fetch images from `evil.example`"),
        ("http://169.254.169.254/latest/meta-data", "does not fetch images from `169.254.169.254`"),
        ("file:///etc/passwd", "`file` URLs"),
        ("http://user@pictures.example/", "no user name"),
        ("http://[bad", "invalid|does not fetch|not a valid URL"),
    ):
        with refused(message):
            fetch(server.fetcher(), server.url(f"redirect/{target}"))
    with refused("redirected more than 3 times"):
        fetch(server.fetcher(), server.url("loop"))


def test_a_redirect_to_a_host_that_resolves_to_a_private_address(server: PictureServer) -> None:
    hosts = [f"{name}:{server.server_port}" for name in ("pictures.example", "inside.example")]
    addresses = {"pictures.example": ["127.0.0.1"], "inside.example": ["127.0.0.2"]}
    fetcher = ImageFetcher(hosts, 10**6, lambda name, port: addresses[name], lambda address: address == "127.0.0.1")
    with refused("`inside.example` has no public address"):
        fetch(fetcher, server.url(f"redirect/{server.url('image', 'inside.example')}"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("status/404", r"`pictures.example:\d+` answered with status 404"),
        ("status/204", "answered with status 204"),
        ("redirect/", "answered|redirected|does not fetch"),
        ("compressed", "sent compressed data"),
        ("cut", "ended before the image was complete"),
        ("nonsense", r"cannot fetch from `pictures.example:\d+`"),
        ("sized/200", "more than 1.0 MB"),
        ("unsized/200", "more than 1.0 MB"),
    ],
)
def test_faults_of_the_other_server(server: PictureServer, path: str, message: str) -> None:
    with refused(message):
        fetch(server.fetcher(), server.url(path))


def test_the_size_limit_holds_for_all_images_of_a_request(server: PictureServer) -> None:
    urls = [server.url(f"{kind}/{count}") for kind in ("sized", "unsized") for count in (3, 5)]
    assert len(fetch(server.fetcher(16 * len(IMAGE)), *urls)) == 4
    with refused("the images that this request names by URL have more than"):
        fetch(server.fetcher(16 * len(IMAGE) - 1), *urls)


@pytest.mark.parametrize("path", ["slow_headers", "slow_body"])
def test_a_server_that_sends_a_byte_at_a_time_meets_the_time_limit(
    server: PictureServer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_images, "LIMIT_S", 0.3)
    started = time.monotonic()
    with refused("takes more than"):
        fetch(server.fetcher(), server.url(path))
    assert time.monotonic() - started < 5


def test_a_resolver_that_does_not_answer_meets_the_time_limit(
    server: PictureServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_images, "LIMIT_S", 0.3)

    def resolve(name: str, port: int) -> list[str]:
        time.sleep(1)
        return ["127.0.0.1"]

    with refused("takes more than"):
        fetch(server.fetcher(resolve=resolve), server.url("image"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_certificate_must_be_that_of_the_host(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    names = ("-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example")
    command = ["openssl", "req", "-x509", *curve, "-keyout", str(key), "-out", str(certificate), *names]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url, other = (server.url("image", f"{name}.example").replace("http", "https") for name in ("pictures", "other"))
    with refused("cannot fetch from"):  # the certificate is not trusted
        fetch(server.fetcher(), url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch(server.fetcher(), url) == {url: IMAGE}
    with refused("cannot fetch from"):
        fetch(server.fetcher(), other)


def test_unknown_and_unreachable_hosts(server: PictureServer) -> None:
    def resolve(name: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    with refused("the host `pictures.example` cannot be found"):
        fetch(server.fetcher(resolve=resolve), server.url("image"))
    server.shutdown()
    server.server_close()
    with refused("cannot fetch from `pictures.example"):
        fetch(server.fetcher(), server.url("image"))


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Upload.Wikimedia.org", "upload.wikimedia.org"),
        ("example.org.", "example.org"),
        ("example.org:8443", "example.org:8443"),
        ("münchen.example", "xn--mnchen-3ya.example"),
        ("[2606:2800:220:1::1]:443", "[2606:2800:220:1::1]:443"),
        ("[2606:2800:220:1::1]", "[2606:2800:220:1::1]"),
    ],
)
def test_allowed_hosts_are_normalized(text: str, host: str) -> None:
    assert normalize_host(text) == host


@pytest.mark.parametrize(
    "text",
    ["https://example.org", "example.org/x", "*", "*.example.org", "a@b", "", "a b", ":80", "a:0", "a:65536", "::1"],
)
def test_other_texts_are_no_hosts(text: str) -> None:
    with pytest.raises(UsageError, match="is not a host"):
        normalize_host(text)
