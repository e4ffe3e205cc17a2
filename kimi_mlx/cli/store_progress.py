"""How far the stores of a model are, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

from kimi_mlx.cli.byte_progress import byte_bars, byte_progress
from kimi_mlx.cli.obtain import tell_licence
from kimi_mlx.cli.output import stderr
from kimi_mlx.store.build import Progress
from kimi_mlx.store.locate import Target
from kimi_mlx.units import format_bytes


class TerminalListener:
    """Bars, or lines into a pipe.

    Args:
        target: the model.
        is_quiet: says nothing at all.
    """

    def __init__(self, target: Target, is_quiet: bool):
        self._target, self._is_quiet = target, is_quiet

    def beginning(self, vision_bytes: int) -> None:
        """The licence, once, and what is left out."""
        tell_licence(self._target, self._is_quiet)
        if not self._is_quiet and vision_bytes:
            stderr.print(f"the vision part ({format_bytes(vision_bytes)}) is left out: text only")

    def checking(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """One bar."""
        return byte_progress("checking", total_bytes, self._is_quiet)

    @contextmanager
    def building(self) -> Generator[Callable[[Progress], None]]:
        """A bar for what is fetched, and one for what is stored."""
        with byte_bars(self._is_quiet) as bars:
            fetching = bars.add_task(f"fetching {self._target.name}", total=None)
            storing = bars.add_task("storing", total=None)

            def report(progress: Progress) -> None:
                bars.update(fetching, completed=progress.fetched_bytes, total=progress.total_bytes)
                bars.update(storing, completed=progress.stored_bytes, total=progress.total_bytes)

            yield report
