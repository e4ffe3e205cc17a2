"""Notice about the licence of the weights, shown once on each machine."""

from __future__ import annotations

from collections.abc import Callable

from kimi_mlx.folders import state_folder
from kimi_mlx.hub.catalogue import CatalogueEntry


def notice(entry: CatalogueEntry) -> str | None:
    """Return the terms that a model's licence adds to MIT; None if there are none."""
    licence = entry.licence
    if licence.display is None:
        return None
    return (
        f"The weights of {entry.title} are under the {licence.name} licence: a product with more than 100 million "
        "monthly active users, or more than 20 million US dollars of monthly revenue, must prominently show "
        f'"{licence.display}" in its user interface. Its text: {licence.url}'
    )


def show_once(entry: CatalogueEntry, write: Callable[[str], object]) -> None:
    """Write the notice, unless this machine has shown it for the same `display` name.

    Without a home folder, or if the marker cannot be written, it is shown every time.
    """
    text, display = notice(entry), entry.licence.display
    if text is None or display is None:
        return
    folder = state_folder()
    marker = None if folder is None else folder / "licences" / display.lower().replace(" ", "-")
    if marker is not None:
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
    write(text)
