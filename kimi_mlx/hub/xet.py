"""Download with hf-xet, which is faster than plain HTTP but cannot resume."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from kimi_mlx.hub.environment import constants
from kimi_mlx.hub.repository import Repository, RepositoryFile
from kimi_mlx.hub.retries import Cancelled
from kimi_mlx.hub.transfer import file_metadata, headers


def fetch_by_xet(
    repository: Repository,
    file: RepositoryFile,
    target: Path,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> bool:
    """Download a file with hf-xet, if it is installed, enabled, and the file is stored in Xet.

    Args:
        repository: repository of the file.
        file: file to download.
        target: destination; overwritten.
        progress: callback for the number of new bytes.
        stop: event that cancels the download.

    Returns:
        True if the file was downloaded; its checksum is not verified. False if plain HTTP must be used.

    Raises:
        Cancelled: the event is set.
    """
    from huggingface_hub import file_download

    if file.sha256 is None or constants().HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
        return False
    data = file_metadata(repository, file, stop).xet_file_data
    if data is None:
        return False
    ended = threading.Event()
    threading.Thread(target=_abort_when_cancelled, args=(stop, ended), daemon=True).start()
    try:
        file_download.xet_get(
            incomplete_path=target,
            xet_file_data=data,
            headers=headers(),
            expected_size=file.size_bytes,
            displayed_filename=file.name,
            tqdm_class=_bar_class(progress),  # pyright: ignore[reportArgumentType]
        )
    except Exception:  # hf-xet raises many types; plain HTTP retries and gives a better message
        if stop.is_set():
            raise Cancelled from None
        return False
    finally:
        ended.set()
    return target.is_file()


def _abort_when_cancelled(stop: threading.Event, ended: threading.Event) -> None:
    """Stop hf-xet's own threads when the download is cancelled."""
    while not ended.wait(0.2):
        if stop.is_set():
            try:
                from huggingface_hub.utils._xet import abort_xet_session
            except ImportError:  # older huggingface_hub: the session ends with the process
                return
            abort_xet_session()
            return


def _bar_class(progress: Callable[[int], None]) -> type:
    """Return the progress bar class for huggingface_hub, which reports bytes written and bytes received."""

    class Bar:
        def __init__(self, *args: object, **kwargs: object):
            self.total: int | None = None
            self.n = 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None:
            self.close()

        def update(self, count: float | None = 1) -> None:
            progress(int(count or 0))

        def update_transfer(self, count: float | None = 1) -> None:
            """Bytes received, fewer than those written."""

        def set_postfix_str(self, *args: object, **kwargs: object) -> None:
            pass

        set_transfer_postfix_str = set_postfix_str

        def refresh(self) -> None:
            pass

        def close(self) -> None:
            pass

    return Bar
