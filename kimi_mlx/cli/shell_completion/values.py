"""Values of options and arguments: models, hosts, strategies, services, choices and paths. Sends no requests."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from typer.models import ParameterInfo

from kimi_mlx.cli.shell_completion.complete import Completion
from kimi_mlx.errors import HistoryError
from kimi_mlx.folders import stores_folder

MAX_HOSTFILE_BYTES = 100_000
MAX_CONVERSATIONS = 50


def values_of(name: str, metavar: str | None, hint: Any, word: str) -> Completion:
    """Return the values of an option or argument.

    Args:
        name: name of the parameter.
        metavar: its name in the help; None for none.
        hint: its type, with what Typer knows of it.
        word: beginning of the value.
    """
    if metavar == "MODEL" or name in ("model", "source"):
        return Completion(list(model_names()), "folders")
    if name == "draft":
        return Completion([("auto", "the known draft model of the model"), *draft_names()], "folders")
    if name == "hosts":
        before = word[: word.rfind(",") + 1]
        given = before.split(",")
        return Completion([(before + host, about) for host, about in host_names() if host not in given])
    if name == "strategy":
        from kimi_mlx.parallel.placement import STRATEGIES

        return Completion([(strategy, "") for strategy in STRATEGIES])
    if name == "continue_":
        return Completion(list(conversation_ids()))
    if metavar == "[WORDS]...":
        from kimi_mlx.cli.history import ACTIONS

        return Completion([*((action, usage) for action, usage in ACTIONS.items()), *conversation_ids()], "files")
    if name == "name":
        from kimi_mlx.services.choose import service_manager

        return Completion([(service, "") for service in service_manager().names()])
    if metavar is not None and "FILE" in metavar.split("|"):  # also text that is more than a path, such as `-f -`
        return Completion(paths="files")
    choices = list(_choices(hint))
    if not choices and metavar is not None and "|" in metavar:
        choices = metavar.split("|")
    return Completion([(choice, "") for choice in choices]) if choices else Completion(paths=_paths(hint))


def _types(hint: Any) -> Iterator[Any]:
    """Yield the types within an annotation, such as `Annotated[list[Path] | None, ...]`."""
    origin = get_origin(hint)
    if origin in (Annotated, Union, UnionType, list):
        for each in get_args(hint)[: 1 if origin is Annotated else None]:
            yield from _types(each)
    else:
        yield hint


def _choices(hint: Any) -> Iterator[str]:
    for each in _types(hint):
        if get_origin(each) is Literal:
            yield from map(str, get_args(each))


def _paths(hint: Any) -> Literal["none", "files", "folders"]:
    if Path not in _types(hint):
        return "none"
    infos = [each for each in get_args(hint) if isinstance(each, ParameterInfo)]
    return "files" if all(each.file_okay for each in infos) else "folders"


def draft_names() -> Iterator[tuple[str, str]]:
    """Yield the known draft models, with their models."""
    from kimi_mlx.hub.catalogue import drafts

    for entry in drafts():
        yield entry.alias, f"for {entry.model}"


def model_names() -> Iterator[tuple[str, str]]:
    """Yield the aliases of known models, then the repositories of the K2 family in the hub's cache and in stores."""
    from kimi_mlx.hub.catalogue import catalogue

    known: set[str | None] = set()
    for entry in catalogue():
        if entry.refused is None:
            known |= {entry.repository, entry.earlier_repository}
            yield entry.alias, entry.title
    for repository in sorted({*_repositories(_hub_cache(), "models--"), *_repositories(stores_folder(), "")} - known):
        yield repository, "on this machine"


def conversation_ids() -> Iterator[tuple[str, str]]:
    """Yield the ids of the latest conversations of the history, with their titles."""
    from kimi_mlx.cli.chat.output.terminal_text import to_line
    from kimi_mlx.history.database import FILE_NAME, history_folder
    from kimi_mlx.history.store import HistoryStore

    folder = history_folder()
    if folder is None or not (folder / FILE_NAME).is_file():
        return
    try:
        with closing(HistoryStore.open(folder)) as store:
            yield from ((item.id, to_line(item.title)) for item in store.conversations(MAX_CONVERSATIONS))
    except HistoryError:  # completion has no messages
        return


def _hub_cache() -> Path:
    """Return the hub's cache. huggingface_hub, which says so too, takes half a second to import."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _repositories(folder: Path | None, prefix: str) -> Iterator[str]:
    """Yield the repositories that have a folder `<prefix>owner--name` and may be of the K2 family."""
    try:
        names = [] if folder is None else os.listdir(folder)
    except OSError:
        return
    for name in names:
        owner, _, rest = name.removeprefix(prefix).partition("--")
        if name.startswith(prefix) and rest and owner != "folder" and re.search("kimi|moonlight", rest, re.IGNORECASE):
            yield f"{owner}/{rest.replace('--', '/')}"


def host_names() -> Iterator[tuple[str, str]]:
    """Yield the hosts in ssh's configuration, and in hostfiles of the current folder and of `hostfiles/`."""
    found: dict[str, str] = {}
    for host in _ssh_hosts(Path.home() / ".ssh" / "config"):
        found.setdefault(host, "~/.ssh/config")
    for path in (*glob.glob("*.json"), *glob.glob("hostfiles/*.json")):
        for host in _hosts_in(Path(path)):
            found.setdefault(host, path)
    yield from found.items()


def _ssh_hosts(path: Path, depth: int = 0) -> Iterator[str]:
    """Yield the names after `Host` without patterns, in a configuration of ssh and the files that it includes."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        keyword, _, value = line.strip().replace("=", " ", 1).partition(" ")
        if keyword.lower() == "host":
            yield from (name for name in value.split() if not re.search(r"[*?!\"]", name))
        elif keyword.lower() == "include" and depth < 3:
            for pattern in value.split():
                pattern = os.path.expanduser(pattern)
                for name in sorted(glob.glob(os.path.join(Path.home() / ".ssh", pattern))):
                    yield from _ssh_hosts(Path(name), depth + 1)


def _hosts_in(path: Path) -> Iterable[str]:
    """Return the hosts of a hostfile; none if it is another kind of file."""
    try:
        if path.stat().st_size > MAX_HOSTFILE_BYTES:
            return []
        document: Any = json.loads(path.read_bytes())
        hosts = cast("list[Any]", document["hosts"] if isinstance(document, dict) else document)
        return [str(host["ssh"]) for host in hosts]
    except (OSError, ValueError, KeyError, TypeError):
        return []
