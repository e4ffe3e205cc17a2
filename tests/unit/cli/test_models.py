"""`kimi-mlx models`: table, details, JSON; and the sampling defaults that chat takes from the catalogue."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from kimi_mlx.cli.app import app
from kimi_mlx.cli.chat.open_chat import chat_options
from kimi_mlx.cli.chat.options import SamplingOptions
from kimi_mlx.cli.models_table import details, find_row, footnotes, table
from kimi_mlx.cluster.hosts.machine import LocalMachine
from kimi_mlx.engine.request import Sampling
from kimi_mlx.errors import UsageError
from kimi_mlx.hub.catalogue import CatalogueEntry, catalogue, find_entry
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.local_chat_model import merge_sampling
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.units import GIB
from tests.fakes import KIMI_MINI
from tests.vision_checkpoints import rewrite

STUDIO = LocalMachine("Apple M3 Ultra", 512 * GIB, 384 * GIB, is_mac=True)
LAPTOP = LocalMachine("Apple M4", 24 * GIB, 18 * GIB, is_mac=True)


@pytest.fixture(autouse=True)
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without downloads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))


def entry_of(alias: str) -> CatalogueEntry:
    entry = find_entry(alias)
    assert entry is not None
    return entry


def lines(width: int, machine: LocalMachine = STUDIO) -> list[str]:
    rows = [find_row(entry, machine) for entry in catalogue()]
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table(rows, machine, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def details_text(alias: str, machine: LocalMachine = STUDIO) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(details(find_row(entry_of(alias), machine), machine))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": str(width)})


@pytest.mark.parametrize("width", [40, 44, 59, 60, 80, 120])
def test_a_row_is_a_line_and_nothing_is_cut(width: int) -> None:
    header, *rows = lines(width)
    assert [row.split()[0] for row in rows] == [entry.alias for entry in catalogue()]
    for line in (header, *rows):
        assert len(line) <= width
        assert "…" not in line
    for row, entry in zip(rows, catalogue(), strict=True):
        if width == 80:
            assert row.rstrip().endswith("not supported" if entry.refused else entry.format)
        if width == 120:
            assert row.rstrip().endswith(entry.about)


@pytest.mark.parametrize(
    ("machine", "fits"),
    [
        (STUDIO, "yes|yes|yes" + 6 * "|2 Macs*" + "|no"),
        (LAPTOP, "yes|yes|yes|ssd|ssd|no|no|no|no|no"),
        (LocalMachine("x86_64", 400 * GIB, 400 * GIB, is_mac=False), "yes|yes|yes" + 6 * "|2 hosts*" + "|no"),
    ],
)
def test_fits_compares_with_the_machine(machine: LocalMachine, fits: str) -> None:
    header, *rows = lines(60, machine)
    column = header.index("fits")
    assert "|".join(row[column:].strip() for row in rows) == fits


def test_the_reason_why_kimi_k3_is_not_supported_is_below_the_table() -> None:
    notes = footnotes([find_row(entry, STUDIO) for entry in catalogue()], STUDIO)
    assert any("kimi-k3 is not supported: another architecture (2.8 T parameters" in note for note in notes)


def test_one_model_in_detail() -> None:
    text = details_text("kimi-k2.6")
    for part in (
        "595.1 GB",
        "613.6 GiB in memory",
        "262,144 tokens",
        "temperature 1, top_p 0.95, min_p 0.01",
        "temperature 0.6, top_p 0.95, min_p 0.01",
        '"Kimi K2.6"',
        "needs 2 Macs like this Mac (512.0 GiB, of which the GPU may use 384.0 GiB)",
        "`kimi-mlx download kimi-k2.6` downloads it",
    ):
        assert part in text
    assert "comes with the package, in " in details_text("kimi-mini")
    assert "even 8 Macs like this Mac (24.0 GiB" in " ".join(details_text("kimi-k2.6", LAPTOP).split())
    assert "not supported: another architecture" in details_text("kimi-k3")


def test_models_that_see_images_are_named() -> None:
    notes = footnotes([find_row(entry, STUDIO) for entry in catalogue()], STUDIO)
    seeing = ["kimi-mini-vl", "kimi-k2.5", "kimi-k2.6", "kimi-k2.7-code"]
    assert f"These models see images: {', '.join(seeing)}." in notes
    for alias, text in {"kimi-k2.6": "yes", "kimi-mini-vl": "yes", "kimi-k2": "no", "kimi-mini": "no"}.items():
        assert re.search(rf"^images +{text} *$", details_text(alias), re.MULTILINE), alias
    assert "\nimages" not in details_text("kimi-k3")
    listed = {entry["alias"]: entry["sees_images"] for entry in json.loads(run("--json").stdout)}
    assert [alias for alias, sees in listed.items() if sees] == seeing


def test_weights_without_a_vision_tower_do_not_see_images(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--moonshotai--Kimi-K2.6" / "snapshots" / ("a" * 40)
    rewrite(snapshot, dict)
    (snapshot / "tokenizer_config.json").write_text("{}")
    (snapshot / "tiktoken.model").write_text("")
    assert find_row(entry_of("kimi-k2.6"), STUDIO).sees_images
    (snapshot / "model-00004-of-000004.safetensors").unlink()
    assert not find_row(entry_of("kimi-k2.6"), STUDIO).sees_images
    text = details_text("kimi-k2.6")
    assert "its vision tower is not on this machine; `kimi-mlx download kimi-k2.6` adds it" in " ".join(text.split())


def test_the_repository_of_earlier_versions_is_used_if_only_that_is_here(tmp_path: Path) -> None:
    assert resolve_model_name("kimi-k2.5").repository == "moonshotai/Kimi-K2.5"
    earlier = tmp_path / "stores" / "mlx-community--Kimi-K2.5"
    earlier.mkdir(parents=True)
    assert resolve_model_name("kimi-k2.5").repository == "mlx-community/Kimi-K2.5"
    assert "no: `mlx-community/Kimi-K2.5` has no vision tower, `moonshotai/Kimi-K2.5` has one" in details_text(
        "kimi-k2.5"
    )
    (tmp_path / "models--moonshotai--Kimi-K2.5").mkdir()
    assert resolve_model_name("kimi-k2.5").repository == "moonshotai/Kimi-K2.5"


def test_a_higher_gpu_limit_is_suggested_if_it_saves_a_mac() -> None:
    assert "1 with a higher GPU limit" in details_text("kimi-k2-0905")
    assert f"iogpu.wired_limit_mb={504 * 1024}`" in details_text("kimi-k2-0905")
    assert "wired_limit" not in details_text("kimi-k2.5")


def test_json_has_all_fields() -> None:
    listed = json.loads(run("--json").stdout)
    names = {item.name for item in fields(CatalogueEntry)}
    computed = {"minimum_memory_bytes", "on_this_machine", "folder", "hosts_needed", "draft"}
    computed |= {"streams_from_ssd", "smallest_memory_bytes"}
    for entry in listed:
        assert set(entry) == names | computed
    by_alias = {entry["alias"]: entry for entry in listed}
    assert by_alias["kimi-mini"]["on_this_machine"] == "package"
    assert by_alias["kimi-mini"]["size_bytes"] > 10**6
    assert by_alias["kimi-k3"]["refused"]
    assert json.loads(run("moonlight", "--json").stdout) == by_alias["moonlight"]


def test_the_command_prints_table_and_details() -> None:
    assert "kimi-k2.7-code" in run().stdout
    assert all(len(line) <= 80 for line in run().stdout.splitlines())
    detail = run("mlx-community/Kimi-K2.5").stdout
    assert detail.startswith("Kimi K2.5: ")
    assert isinstance(run("kimi-k2.55").exception, UsageError)


@pytest.mark.parametrize(
    ("config", "no_thinking", "options", "expected"),
    [
        ({}, False, {}, Sampling(1.0, 0.95, min_p=0.01)),
        ({"temperature": 0.8}, False, {}, Sampling(0.8, 0.95, min_p=0.01)),
        ({"top_p": 0.5, "top_k": 7}, False, {"top_p": 0.7}, Sampling(1.0, 0.7, 7, 0.01)),
        ({"temperature": 0.8, "top_k": 7}, True, {}, Sampling(0.6, 0.95, 7, 0.01)),
        ({}, True, {"temperature": 0.0, "seed": 5}, Sampling(0.0, 0.95, min_p=0.01, seed=5)),
        ({"do_sample": False}, False, {"top_p": None}, Sampling(0.0)),
    ],
)
def test_options_come_before_instant_values_before_the_checkpoint_before_the_catalogue(
    tmp_path: Path, config: dict[str, Any], no_thinking: bool, options: dict[str, Any], expected: Sampling
) -> None:
    for file in KIMI_MINI.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    entry = entry_of("kimi-k2.5")
    recommended = ChatTokenizer.load(tmp_path, defaults=entry.default_sampling()).sampling
    chosen = chat_options(SamplingOptions(**options, thinking=False if no_thinking else None))
    assert merge_sampling(recommended, resolve_model_name("kimi-k2.5").instant_sampling, chosen) == expected


def test_a_model_without_a_switch_keeps_its_values() -> None:
    assert resolve_model_name("kimi-k2-thinking").instant_sampling == {}


def test_a_folder_is_not_in_the_list(tmp_path: Path) -> None:
    error = run(str(tmp_path)).exception
    assert isinstance(error, UsageError)
    assert "is a folder, and not in the list" in error.message
    assert f"kimi-mlx chat {tmp_path}" in (error.hint or "")


def test_sources_are_shown_only_on_request() -> None:
    assert "sources" not in run("kimi-k2").stdout
    assert "sources" in run("kimi-k2", "--sources").stdout


def test_models_with_a_draft_model_name_it() -> None:
    text = details_text("kimi-k2.6")
    assert "kimi-k2.6-draft (lightseekorg/kimi-k2.6-eagle3.1-mla); published: 3.2 tokens per step" in text
    assert "draft model" not in details_text("kimi-k2")
    rows = [find_row(entry, STUDIO) for entry in catalogue()]
    note = next(line for line in footnotes(rows, STUDIO) if "--draft" in line)
    assert "kimi-mini, kimi-k2.5, kimi-k2.6, kimi-k2.7-code" in note
    listed = {entry["alias"]: entry["draft"] for entry in json.loads(run("--json").stdout)}
    assert listed["kimi-mini"] == "kimi-mini-draft"
    assert listed["kimi-k2"] is None


def test_a_draft_model_is_not_a_model() -> None:
    error = run("kimi-k2.6-draft").exception
    assert isinstance(error, UsageError)
    assert "draft model of `kimi-k2.6`" in error.message
