"""Files by hf-xet, the hub's faster way; it cannot go on where it left off."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

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
    """Fetch a file by hf-xet, if it is installed and wanted and the file is kept that way.

    Args:
        repository: where the file is.
        file: what to fetch.
        target: where to; overwritten.
        progress: told how many bytes have come.
        stop: calls it off.

    Returns:
        Whether the file is there, not verified; if not, plain HTTP is the way.

    Raises:
        Cancelled: the event is set.
    """
    from huggingface_hub import constants, file_download

    if file.sha256 is None or constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
        return False
    data = file_metadata(repository, file, stop).xet_file_data
    if data is None:
        return False
    ended = threading.Event()
    threading.Thread(target=_abort_on, args=(stop, ended), daemon=True).start()
    try:
        file_download.xet_get(
            incomplete_path=target,
            xet_file_data=data,
            headers=headers(),
            expected_size=file.size_bytes,
            displayed_filename=file.name,
            tqdm_class=_bar_class(progress),  # pyright: ignore[reportArgumentType]
        )
    except Exception:  # hf-xet raises many kinds; whatever it is, plain HTTP tries again and finds better words
        if stop.is_set():
            raise Cancelled from None
        return False
    finally:
        ended.set()
    return target.is_file()


def _abort_on(stop: threading.Event, ended: threading.Event) -> None:
    """End hf-xet's own threads when the work is called off."""
    while not ended.wait(0.2):
        if stop.is_set():
            try:
                from huggingface_hub.utils._xet import abort_xet_session
            except ImportError:  # an older huggingface_hub: it ends with the process
                return
            abort_xet_session()
            return


def _bar_class(progress: Callable[[int], None]) -> type:
    """What huggingface_hub takes for a class of progress bars, and tells of bytes written and bytes received."""

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
