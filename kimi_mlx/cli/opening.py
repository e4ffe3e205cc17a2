"""A model in this process, or on ranks of this machine."""

from __future__ import annotations

from kimi_mlx.cli.output import load_progress
from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import Session, SessionOptions


def open_here(options: SessionOptions, name: str, is_quiet: bool) -> Session:
    """Load it behind a progress bar.

    Raises:
        KimiMlxError: it cannot be loaded.
    """
    where = f" on {options.ranks} ranks" if options.ranks > 1 else ""
    with load_progress(f"loading {name}{where}", is_quiet) as progress:
        return open_session(options, progress)
