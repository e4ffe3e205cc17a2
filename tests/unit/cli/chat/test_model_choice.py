"""The model of a chat without a name, and the note above it, on machines of several sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_mlx.cli.chat.model_choice import default_model, first_note
from kimi_mlx.cli.models_table import Row, find_row
from kimi_mlx.cluster.hosts.machine import LocalMachine, gpu_limit
from kimi_mlx.hub.catalogue import catalogue
from kimi_mlx.store.locate import LocalState
from kimi_mlx.units import GIB


def mac(memory_gib: int) -> LocalMachine:
    memory = memory_gib * GIB
    return LocalMachine("Apple M3 Ultra", memory, gpu_limit(memory, None), is_mac=True)


def rows_of(machine: LocalMachine, **states: LocalState) -> list[Row]:
    """Rows of the catalogue in which only these models are on the machine."""
    rows = [find_row(entry, machine) for entry in catalogue()]
    by_alias = {name.replace("_", "-"): state for name, state in states.items()}
    return [
        row if row.entry.is_packaged else replace(row, local_state=by_alias.get(row.entry.alias, "no")) for row in rows
    ]


@pytest.mark.parametrize(
    ("memory_gib", "lines"),
    [
        (8, ["This Mac (8 GB) is too small"]),
        (24, ["This Mac (24 GB) runs moonlight: `kimi-mlx download moonlight` (9."]),
        (
            128,
            [
                "This Mac (128 GB) runs moonlight",
                "6 Macs of this size run kimi-k2-0905: `kimi-mlx launch --hosts mac-a.local,mac-b.local,... chat",
            ],
        ),
        (
            512,
            [
                "This Mac (512 GB) runs moonlight",
                "2 Macs of this size run kimi-k2.6: `kimi-mlx launch --hosts mac-a.local,mac-b.local chat kimi-k2.6`",
            ],
        ),
        (2048, ["This Mac (2048 GB) runs kimi-k2.6: `kimi-mlx download kimi-k2.6` (595."]),
    ],
)
def test_the_note_says_what_would_fit(memory_gib: int, lines: list[str]) -> None:
    machine = mac(memory_gib)
    rows = rows_of(machine)
    assert default_model(rows) == "kimi-mini"
    first, *others = first_note(rows, machine).splitlines()
    assert first.startswith("kimi-mini is a toy")
    assert len(others) == len(lines)
    for line, expected in zip(others, lines, strict=True):
        assert expected in line


def test_the_only_real_model_is_used() -> None:
    machine = mac(24)
    rows = rows_of(machine, moonlight="yes")
    assert default_model(rows) == "moonlight"
    assert first_note(rows, machine).startswith("moonlight is the model on this machine")


def test_of_several_real_models_none_is_chosen() -> None:
    machine = mac(2048)
    rows = rows_of(machine, moonlight="yes", kimi_k2="yes")
    assert default_model(rows) == "kimi-mini"
    assert first_note(rows, machine).splitlines()[1] == "On this machine: moonlight, kimi-k2. `kimi-mlx chat kimi-k2`"


@pytest.mark.parametrize("state", ["store", "yes"])
def test_a_model_that_does_not_fit_alone_is_not_chosen(state: LocalState) -> None:
    machine = mac(512)
    rows = rows_of(machine, kimi_k2=state)
    assert default_model(rows) == "kimi-mini"
    assert "`kimi-mlx launch --hosts ... chat kimi-k2`, on several Macs" in first_note(rows, machine)


def test_half_a_download_is_no_model() -> None:
    machine = mac(24)
    assert default_model(rows_of(machine, moonlight="partly")) == "kimi-mini"
