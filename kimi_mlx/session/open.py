"""Open a session: in this process, or on a ring of local ranks."""

from __future__ import annotations

from kimi_mlx.session.session import LoadProgress, Session, SessionOptions


def open_session(options: SessionOptions, progress: LoadProgress = lambda done, total: None) -> Session:
    """Load a model in this process, or on a ring of local ranks if `options.ranks` is more than 1.

    Args:
        options: model and options.
        progress: callback with the layers that the slowest rank has loaded, and the number of layers.

    Raises:
        KimiMlxError: the model cannot be loaded.
    """
    # Imported here: LocalSession imports MLX, which the front of a ring does not need.
    if options.ranks == 1:
        from kimi_mlx.session.local import LocalSession

        return LocalSession(options, progress)
    from kimi_mlx.session.ring import RingSession

    num_loaded = dict.fromkeys(range(options.ranks), 0)

    def report_slowest(done: int, total: int, rank: int) -> None:
        num_loaded[rank] = done
        progress(min(num_loaded.values()), total)

    return RingSession(options, report_slowest)
