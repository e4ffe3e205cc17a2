"""Output of `kimi-mlx models`: a table of the known models, or the facts of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from kimi_mlx.cli.model_size import entry_shape
from kimi_mlx.cli.output import stdout
from kimi_mlx.cluster.hosts.machine import LocalMachine
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.hub.catalogue import CatalogueEntry, DraftEntry, SamplingValues, draft_of
from kimi_mlx.hub.licence import notice
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.needs import hosts_needed, memory_per_host, smallest_memory, streams_here
from kimi_mlx.sizing.hosts import MAX_HOSTS, SYSTEM_BYTES, usable_bytes
from kimi_mlx.store.locate import LocalState, local_state
from kimi_mlx.store.model_ref import repository_of
from kimi_mlx.store.vision import no_vision_error, sees_images
from kimi_mlx.units import GB, GIB, format_bytes, format_context, format_gib

WIDE, NARROW = 110, 76
"""Minimum width of the terminal for the description of a model, and for its format."""

MIN_WIDTHS = {"GB": 60, "context": 60, "here": 44}
"""Minimum width of the terminal for columns that narrow ones leave out."""


@dataclass(frozen=True)
class Row:
    """A known model and its state on this machine.

    Attributes:
        entry: the model's entry in the catalogue.
        local_state: which part of the model is on this machine.
        folder: folder of the model on this machine; None if it is not here.
        size_bytes: size in the catalogue, else that of the files here.
        shape: dimensions and sizes; None if the model is not supported.
        sees_images: whether the weights on this machine have a vision tower, else whether those in the catalogue have.
        hosts_needed: number of machines like this one that are needed to have all experts in memory; None if there
            would be too many, or the model is not supported.
        streams_here: whether it runs on this machine if some of its experts are read from the SSD.
    """

    entry: CatalogueEntry
    local_state: LocalState
    folder: Path | None
    size_bytes: int | None
    shape: ModelShape | None
    sees_images: bool
    hosts_needed: int | None
    streams_here: bool = False

    @property
    def draft(self) -> DraftEntry | None:
        """Draft model of the model; None if none is known."""
        return draft_of(self.entry.alias)

    @property
    def memory_bytes(self) -> int | None:
        """Memory needed on one host; None if the model is not supported."""
        return None if self.shape is None else memory_per_host(self.shape)

    def to_dict(self) -> dict[str, object]:
        """Return all fields, for JSON."""
        return {
            **asdict(self.entry),
            "size_bytes": self.size_bytes,
            "sees_images": self.sees_images,
            "minimum_memory_bytes": self.memory_bytes,
            "on_this_machine": self.local_state,
            "folder": str(self.folder) if self.folder else None,
            "hosts_needed": self.hosts_needed,
            "streams_from_ssd": self.streams_here,
            "smallest_memory_bytes": None if self.shape is None else smallest_memory(self.shape),
            "draft": None if self.draft is None else self.draft.alias,
        }


def find_row(entry: CatalogueEntry, machine: LocalMachine) -> Row:
    """Return a model's row: look for the model on this machine and check whether it fits."""
    here, folder = local_state(entry)
    size = entry.size_bytes
    if size is None and folder is not None:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    shape = entry_shape(entry)
    needed = None if shape is None else hosts_needed(shape, machine.memory_bytes, machine.gpu_bytes)
    streams = shape is not None and needed != 1 and streams_here(shape, machine.memory_bytes, machine.gpu_bytes)
    sees = _sees_images(entry, here, folder)
    return Row(entry, here, folder, size, shape, sees, 1 if entry.is_packaged else needed, streams)


def _sees_images(entry: CatalogueEntry, here: LocalState, folder: Path | None) -> bool:
    """Return whether the weights on this machine have a vision tower; without complete ones, those in the catalogue."""
    if here in ("no", "partly") or folder is None:
        return entry.sees_images and repository_of(entry) == entry.repository
    try:
        return sees_images(folder, load_config(folder))
    except KimiMlxError:  # a broken checkpoint: an error when it is loaded
        return False


def print_table(rows: Sequence[Row], machine: LocalMachine) -> None:
    """Print the table of all models, and its footnotes."""
    stdout.print(table(rows, machine, stdout.width), soft_wrap=False)
    stdout.print()
    for line in footnotes(rows, machine):
        stdout.print(line, style="dim", markup=False, soft_wrap=False)


def print_details(row: Row, machine: LocalMachine, has_sources: bool) -> None:
    """Print all facts of one model."""
    stdout.print(Text(f"{row.entry.title}: {row.entry.about}", style="bold"), soft_wrap=False)
    stdout.print(details(row, machine, has_sources=has_sources), soft_wrap=False)


def table(rows: Sequence[Row], machine: LocalMachine, width: int) -> Table:
    """Return a table of the models for a terminal of `width` columns, one line per model."""
    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    headers = ["model", "GB", "GiB", "context", "here", "fits"]
    shown = [header for header in headers if width >= MIN_WIDTHS.get(header, 0)]
    for header in shown:
        result.add_column(header, justify="right" if header in ("GB", "GiB", "context") else "left", no_wrap=True)
    last = "description" if width >= WIDE else "format" if width >= NARROW else None
    if last is not None:
        result.add_column(last, no_wrap=True, overflow="ellipsis")
    for row in rows:
        cells = [
            row.entry.alias,
            _in_units(row.size_bytes, GB),
            "any" if row.entry.is_packaged else _in_units(row.memory_bytes, GIB),
            format_context(row.entry.context_tokens),
            row.local_state,
            _fits(row, machine),
        ]
        text = row.entry.about if width >= WIDE or row.entry.refused else row.entry.format
        style = None if row.entry.refused is None else "dim"
        by_header = dict(zip(headers, cells, strict=True))
        result.add_row(*(by_header[header] for header in shown), *([] if last is None else [text]), style=style)
    return result


def footnotes(rows: Sequence[Row], machine: LocalMachine) -> list[str]:
    """Return the notes below the table: meaning of the columns, and why models are not supported."""
    lines = [
        "GB: size of the download. GiB: memory on one host, with 8k tokens of context; the system needs "
        f"another {format_gib(SYSTEM_BYTES)}.",
        f"fits: whether the model fits on {_machine_text(machine)}, or the number of {_hosts(machine)} like it that "
        f"it needs; no: even {MAX_HOSTS} are too few. * and ssd: it runs on this one with some "
        "experts on the SSD, which is slower (`kimi-mlx plan MODEL`).",
    ]
    seeing = [row.entry.alias for row in rows if row.sees_images]
    lines.append(f"These models see images: {', '.join(seeing)}.")
    drafted = [row.entry.alias for row in rows if row.draft is not None]
    lines.append(f"`--draft auto` speeds up these models with a draft model: {', '.join(drafted)}.")
    lines += [
        f"{row.entry.alias} is not supported: {row.entry.refused}." for row in rows if row.entry.refused is not None
    ]
    return [*lines, "`kimi-mlx models MODEL` shows the details of one model."]


def details(row: Row, machine: LocalMachine, has_sources: bool = False) -> Table:
    """Return a table of all facts of one model, in two columns."""
    entry = row.entry
    facts = {
        "alias": entry.alias,
        "repository": repository_of(entry),
        "original": entry.original_repository,
        "format": entry.format,
        "download": None if entry.size_bytes is None else format_bytes(entry.size_bytes),
        "weights": None if row.shape is None else f"{format_gib(row.shape.weights_bytes)} in memory",
        "memory needed": _memory_text(row),
        "context": f"{entry.context_tokens:,} tokens",
        "images": _images_text(row),
        "draft model": _draft_text(row),
        "sampling": _sampling_text(entry.sampling),
        "without thinking": _sampling_text(entry.instant_sampling),
        "licence": notice(entry) or f"{entry.licence.name}, {entry.licence.url}",
        "fits": _fits_text(row, machine),
        "here": _local_state_text(row),
        "sources": "\n".join(f"{name}: {source}" for name, source in entry.source.items()) if has_sources else None,
    }
    result = Table.grid(padding=(0, 2, 0, 0))
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact is not None:
            result.add_row(name, Text(fact))
    return result


def _in_units(count: int | None, unit: int) -> str:
    """Format bytes for a column of GB or GiB."""
    if count is None:
        return "-"
    return f"{count / unit:.1f}" if count >= unit / 10 else "<0.1"


def _fits(row: Row, machine: LocalMachine) -> str:
    """Return the cell of the column `fits`, such as `yes` or `2 Macs`."""
    if row.hosts_needed is None:
        return "ssd" if row.streams_here else "no"
    hosts = f"{row.hosts_needed} {_hosts(machine)}"
    return "yes" if row.hosts_needed == 1 else f"{hosts}*" if row.streams_here else hosts


def _fits_text(row: Row, machine: LocalMachine) -> str:
    """Return whether the model fits on this machine, and what would help."""
    entry, needed = row.entry, row.hosts_needed
    if entry.refused is not None:
        return f"not supported: {entry.refused}"
    here = _machine_text(machine)
    if needed is None:
        answer = (
            f"no: needs {format_gib(row.memory_bytes or 0)}; even {MAX_HOSTS} {_hosts(machine)} like {here} are too few"
        )
    else:
        answer = f"yes, on {here}" if needed == 1 else f"needs {needed} {_hosts(machine)} like {here}"
    limit = usable_bytes(machine.memory_bytes)
    with_limit = None if row.shape is None else hosts_needed(row.shape, machine.memory_bytes, limit)
    if machine.is_mac and with_limit is not None and (needed is None or with_limit < needed):
        command = f"sudo sysctl iogpu.wired_limit_mb={limit // 1024**2}"
        answer += f"; {with_limit} with a higher GPU limit (until the next restart): `{command}`"
    if row.shape is not None and needed != 1:
        smallest = format_gib(smallest_memory(row.shape))
        if row.streams_here:
            answer += f"; here with some experts on the SSD (at least {smallest}), which `kimi-mlx plan` predicts"
        else:
            answer += f"; with experts on the SSD, one needs {smallest}"
    return answer


def _local_state_text(row: Row) -> str:
    """Return where the model is on this machine, or how to download it."""
    if row.entry.refused is not None:
        return "no"
    if row.local_state == "package":
        return f"comes with the package, in {row.folder}"
    if row.local_state in ("yes", "store"):
        return f"{'yes' if row.local_state == 'yes' else 'as a store'}, in {row.folder}"
    state = f"partly, in {row.folder}" if row.local_state == "partly" else "no"
    return f"{state}; `kimi-mlx download {row.entry.alias}` downloads it"


def _images_text(row: Row) -> str | None:
    """Return whether the model sees images, and how to add the vision tower if it is only missing here."""
    entry = row.entry
    if row.sees_images:
        return "yes"
    if not entry.sees_images:
        return None if entry.refused is not None else "no"
    if row.folder is None or repository_of(entry) != entry.repository:
        return f"no: `{repository_of(entry)}` has no vision tower, `{entry.repository}` has one"
    try:
        error = no_vision_error(row.folder, load_config(row.folder), entry.alias)
    except KimiMlxError:  # a broken checkpoint: an error when it is loaded
        return "no"
    return f"no: {error.message}; {error.hint}"


def _draft_text(row: Row) -> str | None:
    """Return the draft model, its published acceptance and where it comes from."""
    if (draft := row.draft) is None:
        return None
    speed = "" if draft.tokens_per_step is None else f"; published: {draft.tokens_per_step:g} tokens per step"
    return f"{draft.alias} ({draft.repository or 'bundled'}){speed}; use it with `--draft auto`"


def _memory_text(row: Row) -> str | None:
    """Return the minimum memory on one host, and on as many hosts like this one as are needed."""
    if row.entry.is_packaged:
        return "any machine"
    if row.shape is None:
        return None
    answer = f"{format_gib(memory_per_host(row.shape))} on one host"
    if row.hosts_needed is not None and row.hosts_needed > 1:
        answer += f", {format_gib(memory_per_host(row.shape, row.hosts_needed))} on each of {row.hosts_needed}"
    return f"{answer}; the system needs another {format_gib(SYSTEM_BYTES)} on each"


def _sampling_text(values: SamplingValues | None) -> str | None:
    return None if values is None else ", ".join(f"{name} {value:g}" for name, value in values.recommended().items())


def _machine_text(machine: LocalMachine) -> str:
    """Return e.g. `this Mac (512.0 GiB, of which the GPU may use 384.0 GiB)`."""
    kind = "Mac" if machine.is_mac else "machine"
    is_limited = machine.gpu_bytes < machine.memory_bytes
    limit = f", of which the GPU may use {format_gib(machine.gpu_bytes)}" if is_limited else ""
    return f"this {kind} ({format_gib(machine.memory_bytes)}{limit})"


def _hosts(machine: LocalMachine) -> str:
    return "Macs" if machine.is_mac else "hosts"
