"""Requests to the hub for a file: bytes from any position, again and again until they are there.

All goes through huggingface_hub's session, so that its environment variables, token and proxies apply. Each wait for
the network ends: connections and reads after HF_HUB_DOWNLOAD_TIMEOUT, tries as kimi_mlx.hub.retries says.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from kimi_mlx.errors import WeightsError
from kimi_mlx.hub.error_messages import client_errors
from kimi_mlx.hub.repository import Repository, RepositoryFile
from kimi_mlx.hub.retries import Cancelled, IncompleteResponse, Retries, with_retries

if TYPE_CHECKING:
    from huggingface_hub.file_download import HfFileMetadata
    from huggingface_hub.utils import httpx


def file_metadata(repository: Repository, file: RepositoryFile, stop: threading.Event) -> HfFileMetadata:
    """What the hub says of a file without sending it."""
    from huggingface_hub import constants, get_hf_file_metadata

    url, timeout_s = _url(repository, file), constants.HF_HUB_DOWNLOAD_TIMEOUT
    retries = Retries(repository.name, stop)
    return with_retries(lambda: get_hf_file_metadata(url, timeout=timeout_s, headers=headers()), retries)


def headers() -> dict[str, str]:
    """Of each request: token and who we are; no compression, which positions in a file do not survive."""
    from huggingface_hub.utils import build_hf_headers

    return {**build_hf_headers(library_name="kimi-mlx"), "Accept-Encoding": "identity"}


def stream_range(
    repository: Repository, file: RepositoryFile, start: int, end: int, stop: threading.Event
) -> Iterator[bytes]:
    """Bytes from start to before end of a file, as they arrive; a connection that breaks is made anew.

    Raises:
        WeightsError: they cannot be fetched.
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
                    piece = chunk[skipped_bytes:][: end - start]
                    skipped_bytes = max(0, skipped_bytes - len(chunk))
                    if piece:
                        start += len(piece)
                        retries.succeeded()
                        yield piece
                    if start == end:
                        return
            raise IncompleteResponse(f"`{file.name}` ends {end - start} bytes too early")
        except client_errors() as error:
            retries.wait_after(error)


def _request(
    repository: Repository, file: RepositoryFile, start: int, end: int
) -> AbstractContextManager[httpx.Response]:
    from huggingface_hub import constants, get_session

    fields = headers()
    if end < file.size_bytes:
        fields["Range"] = f"bytes={start}-{end - 1}"
    elif start:
        fields["Range"] = f"bytes={start}-"
    return get_session().stream(
        "GET",
        _url(repository, file),
        headers=fields,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
    )


def _check_range(response: httpx.Response, repository: Repository, file: RepositoryFile, start: int) -> int:
    """How many bytes to skip: a server that does not know ranges sends the file from its beginning."""
    from huggingface_hub.utils import hf_raise_for_status

    hf_raise_for_status(response)
    if response.status_code == 206:
        answer = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if answer and int(answer[1]) == start and answer[2] in (str(file.size_bytes), "*"):
            return 0
    elif response.status_code == 200:
        has_length = "Content-Encoding" not in response.headers
        length = response.headers.get("Content-Length") if has_length else None
        if length in (None, str(file.size_bytes)):
            return start
    raise WeightsError(
        f"the hub sends something else than `{file.name}` of `{repository.name}`, which has {file.size_bytes} bytes",
        hint="check HF_ENDPOINT and proxies, and whether the network wants a log-in; then try again",
    )


def _url(repository: Repository, file: RepositoryFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository.name, file.name, revision=repository.commit)
