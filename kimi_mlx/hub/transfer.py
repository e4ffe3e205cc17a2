"""Requests for the bytes of a file, with retries.

All requests use huggingface_hub's session, so that its environment variables, token and proxies apply. Every wait for
the network is limited: connections and reads by HF_HUB_DOWNLOAD_TIMEOUT, retries by kimi_mlx.hub.retries.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from kimi_mlx.hub.environment import constants
from kimi_mlx.hub.error_messages import client_errors
from kimi_mlx.hub.repository import Repository, RepositoryFile
from kimi_mlx.hub.retries import Cancelled, IncompleteResponse, Retries, WrongResponse, with_retries

if TYPE_CHECKING:
    from huggingface_hub.file_download import HfFileMetadata
    from huggingface_hub.utils import httpx


def file_metadata(repository: Repository, file: RepositoryFile, stop: threading.Event) -> HfFileMetadata:
    """Return the hub's metadata of a file."""
    from huggingface_hub import get_hf_file_metadata

    url, timeout_s = _url(repository, file), constants().HF_HUB_DOWNLOAD_TIMEOUT
    retries = Retries(repository.name, stop)
    return with_retries(lambda: get_hf_file_metadata(url, timeout=timeout_s, headers=headers()), retries)


def headers() -> dict[str, str]:
    """Return the request headers: token and user agent, and no compression, which would change byte positions."""
    from huggingface_hub.utils import build_hf_headers

    return {**build_hf_headers(library_name="kimi-mlx"), "Accept-Encoding": "identity"}


def stream_range(
    repository: Repository, file: RepositoryFile, start: int, end: int, stop: threading.Event
) -> Iterator[bytes]:
    """Yield the bytes from `start` up to but excluding `end` of a file; reconnect if the connection breaks.

    Raises:
        WeightsError: the download failed.
        Cancelled: the event is set.
    """
    retries = Retries(repository.name, stop)
    while start < end:
        try:
            with _request(repository, file, start, end) as response:
                skipped_bytes = _check_range(response, repository, file, start)
                for chunk in response.iter_bytes():
                    if stop.is_set():
                        raise Cancelled
                    data = chunk[skipped_bytes:][: end - start]
                    skipped_bytes = max(0, skipped_bytes - len(chunk))
                    if data:
                        start += len(data)
                        retries.succeeded()
                        yield data
                    if start == end:
                        return
            raise IncompleteResponse(f"`{file.name}` ended {end - start} bytes early")
        except client_errors() as error:
            retries.wait_after(error)


def _request(
    repository: Repository, file: RepositoryFile, start: int, end: int
) -> AbstractContextManager[httpx.Response]:
    from huggingface_hub import get_session

    fields = headers()
    if end < file.size_bytes:
        fields["Range"] = f"bytes={start}-{end - 1}"
    elif start:
        fields["Range"] = f"bytes={start}-"
    return get_session().stream(
        "GET",
        _url(repository, file),
        headers=fields,
        timeout=constants().HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
    )


def _check_range(response: httpx.Response, repository: Repository, file: RepositoryFile, start: int) -> int:
    """Return the number of bytes to skip: a server without range support sends the file from its start."""
    from huggingface_hub.utils import hf_raise_for_status

    hf_raise_for_status(response)
    if response.status_code == 206:
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if content_range and int(content_range[1]) == start and content_range[2] in (str(file.size_bytes), "*"):
            return 0
    elif response.status_code == 200:
        has_length = "Content-Encoding" not in response.headers
        length = response.headers.get("Content-Length") if has_length else None
        if length in (None, str(file.size_bytes)):
            return start
    raise WrongResponse(f"the response for `{file.name}` is not that file of {file.size_bytes} bytes")


def _url(repository: Repository, file: RepositoryFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository.name, file.name, revision=repository.commit)
