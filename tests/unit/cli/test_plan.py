"""`kimi-mlx plan`: tables in 80 columns, JSON, errors, hosts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import kimi_mlx.cli.plan_inputs
from kimi_mlx.cli.app import app
from kimi_mlx.cli.plan_bars import memory_bar
from kimi_mlx.cli.plan_hosts import host_machines, measured_links
from kimi_mlx.cluster.doctor.doctor import Diagnosis
from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.network.links import LinkSpeed, Network
from kimi_mlx.cluster.network.measure_networks import Link
from kimi_mlx.errors import ConfigError, LinkError, SshError, UsageError
from kimi_mlx.planner.memory import HostMemory
from kimi_mlx.units import GIB
from tests.fakes import KIMI_MINI

NETWORK = Network("thunderbolt", ("10.0.0.1", "10.0.0.2"), ("en5", "en5"))


@pytest.fixture(autouse=True)
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without downloads, and a terminal of 80 columns."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))
    monkeypatch.setattr("kimi_mlx.cli.output.stdout._width", 80)


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


def diagnosis(**facts: object) -> Diagnosis:
    known = {
        host: Facts(host, True, chip="Apple M3 Ultra", memory_bytes=512 * GIB, wired_limit_mb=0)
        for host in ("mac-a", "mac-b")
    }
    links = (Link(NETWORK, LinkSpeed(600e-6, 5e9)),)
    return Diagnosis(("mac-a", "mac-b"), known, (), links, NETWORK, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        ("kimi-k2", "--machines", "m3-ultra-512x2"),
        ("kimi-k2", "--machines", "m3-ultra-512,m4-max-128"),
        ("kimi-k2.5", "--machines", "m3-ultra-512x4", "--fast-sync", "--cost", "--subscription", "200"),
        ("kimi-k2", "--machines", "m3-ultra-512", "--expert-memory", "all"),
        ("kimi-k2.6", "--machines", "m3-ultra-256x2", "--draft", "auto"),
        ("--backtest",),
    ],
)
def test_tables_fit_80_columns(words: tuple[str, ...]) -> None:
    result = call(*words)
    assert result.exit_code == (1 if "all" in words else 0)
    assert all(len(line.rstrip()) <= 80 for line in result.stdout.splitlines())
    assert "…" not in result.stdout


def test_the_choice_is_a_sentence() -> None:
    shown = call("kimi-k2", "--machines", "m3-ultra-512x2").stdout
    assert "Choice: hybrid, 2 hosts, jaccl:" in shown
    assert "Why not the others:" in shown


def test_a_model_that_does_not_fit_says_how_many_machines_are_enough() -> None:
    result = call("kimi-k2", "--machines", "m3-ultra-512", "--expert-memory", "all")
    assert result.exit_code == 1
    shown = result.stdout
    assert "Choice: none" in shown
    assert shown.startswith("Does not fit. 2 x m3-ultra-512 would be enough.\n")
    assert "fits" in call("kimi-k2", "--machines", "m3-ultra-512", "--expert-bits", "3").stdout
    assert "iogpu.wired_limit_mb=" in call("kimi-k2", "--machines", "m3-ultra-512", "--expert-bits", "3").stdout


def test_json() -> None:
    value = json.loads(call("kimi-k2", "--machines", "m3-ultra-512x2", "--cost", "--json").stdout)
    assert value["options"][value["choice"]]["strategy"] == "hybrid"
    assert value["cost"]["price"] == 18998
    value = json.loads(call("--backtest", "--json").stdout)
    assert value["median_error"] < 0.1


def test_machines_is_repeatable() -> None:
    value = json.loads(call("kimi-k2", "--machines", "m3-ultra-512", "--machines", "m4-max-128", "--json").stdout)
    assert max(len(option["hosts"]) for option in value["options"]) == 2


def test_a_folder_is_planned_from_its_config() -> None:
    value = json.loads(call(str(KIMI_MINI), "--machines", "m1-8", "--json").stdout)
    assert value["options"][value["choice"]]["strategy"] == "single"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("kimi-k2", "--machines", "m3-ultra-511"), "no Mac with m3-ultra and 511 GB"),
        (("kimi-k2", "--machines", "m3-ultra-512", "--context", "1000000"), "131072"),
        (("kimi-k2", "--link", "measured"), "needs hosts"),
        (("someone/else", "--machines", "m3-ultra-512"), "are not known here"),
        (("kimi-k", "--machines", "m3-ultra-512"), "no model"),
        (("kimi-k2", "--machines", "m4-max-128x8", "--cost"), "price"),
        (("kimi-k2", "--machines", "m3-ultra-512", "--expert-bits", "7"), "cannot make"),
    ],
)
def test_errors_have_hints(words: tuple[str, ...], message: str) -> None:
    result = call(*words)
    assert isinstance(result.exception, UsageError)
    assert message in result.exception.message
    assert result.exception.hint


def test_hosts_and_a_measured_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kimi_mlx.cli.plan_inputs, "diagnose_hosts", lambda *words, **more: diagnosis())  # pyright: ignore
    value = json.loads(call("kimi-k2", "--hostfile", "two.json", "--link", "measured", "--json").stdout)
    option = value["options"][value["choice"]]
    assert option["hosts"] == ["mac-a", "mac-b"]
    assert option["link"]["name"] == "measured"
    assert option["link"]["hop_s"] == 300e-6
    shown = call("kimi-k2", "--hostfile", "two.json").stdout
    assert "hybrid, 2 hosts, jaccl" in shown


def test_measured_links() -> None:
    (ring,) = measured_links(diagnosis())
    assert (ring.backend, ring.bytes_per_s) == ("ring", 5e9)
    assert [link.backend for link in measured_links(diagnosis(backend="jaccl"))] == ["jaccl", "ring"]
    problem = Finding("mac-a, mac-b", "link", "problem", "no answer")
    with pytest.raises(LinkError, match="no answer"):
        measured_links(Diagnosis(("mac-a", "mac-b"), {}, (problem,)))
    with pytest.raises(SshError, match="mac-a"):
        host_machines(Diagnosis(("mac-a",), {}, ()))


@pytest.mark.parametrize(
    "words",
    [
        ("kimi-k2.6", "--machines", "m3-ultra-512x2", "--draft", "auto"),
        ("kimi-k2", "--machines", "m3-ultra-512,m4-max-128"),
        ("kimi-k2.6", "--machines", "m6-ultra-512:1500GB/sx2", "--expert-bits", "3"),
    ],
)
def test_the_report_has_the_choice_first_its_strategy_and_bars(words: tuple[str, ...]) -> None:
    value = json.loads(call(*words, "--json").stdout)
    choice = value["options"][value["choice"]]
    shown = call(*words).stdout
    lines = shown.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("strategy "))
    rows = [line.split() for line in lines[header + 1 : lines.index("", header)]]
    assert rows[0][0].rstrip("*") == choice["strategy"]
    fits = [row[4] for row in rows]
    assert fits == sorted(fits, key=lambda cell: cell == "no")
    assert all((row[-1] == "-") == (row[4] == "no") for row in rows)
    assert (f"--strategy {choice['placement']}`" in shown) == (choice["strategy"] != "single")
    assert "#####" in shown
    assert "first token" in " ".join(shown.split())
    assert "###" not in json.dumps(value)
    assert all(len(line.rstrip()) <= 80 and line.isascii() for line in lines)


def test_a_draft_model_is_planned_with_and_without() -> None:
    shown = call("kimi-k2.6", "--machines", "m3-ultra-512x2", "--draft", "kimi-k2.6-draft").stdout
    assert "with kimi-k2.6-draft: 3.2 tokens per step" in shown
    assert "with drafts." in shown
    assert "draft model" in shown


def test_a_draft_model_that_costs_more_than_it_gains_is_named() -> None:
    words = ("kimi-k2.6", "--machines", "m3-ultra-512,m4-max-128", "--draft", "auto")
    assert call(*words).stdout.startswith("Faster without the draft model, which takes memory: pipeline*, 2 hosts")
    assert "without the draft model" not in call("kimi-k2.6", "--machines", "m3-ultra-512x2", *words[-2:]).stdout


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("kimi-k2", "--draft", "auto"), UsageError),
        (("kimi-k2.6", "--draft", "someone/draft"), UsageError),
        (("kimi-k2.6", "--draft", "kimi-mini-draft"), UsageError),
        (("moonlight", "--draft", str(KIMI_MINI.parent / "kimi-mini-draft")), ConfigError),
    ],
)
def test_wrong_draft_models_are_errors(words: tuple[str, ...], error: type[Exception]) -> None:
    result = call(*words, "--machines", "m3-ultra-512x2")
    assert isinstance(result.exception, error)


def test_bars_of_memory_add_up() -> None:
    for needed in (0, 10, 200, 400, 500, 600):
        memory = HostMemory("mac", needed * GIB, GIB, GIB, 384 * GIB, 504 * GIB, 2 * GIB)
        bar = memory_bar(memory).split("[")[1].split("]")[0]
        assert len(bar) == 41
        assert bar.count("|") == 1
        shown = len(bar) - 1 - bar.count(".")
        whole = max(504, needed + 4)
        assert shown == pytest.approx(40 * (needed + 4) / whole, abs=3)


@pytest.mark.parametrize("width", [40, 60])
def test_narrow_terminals_leave_columns_out(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.cli.output.stdout._width", width)
    shown = call("kimi-k2.6", "--machines", "m4-max-64", "--preset", "2bit").stdout
    assert "…" not in shown
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    assert "strategy  hosts  " in shown
    assert "decode\n" in shown


def test_presets_of_convert_are_planned() -> None:
    sizes = [
        json.loads(call("kimi-k2.6", "--machines", "m5-max-128", "--preset", preset, "--json").stdout)["model"]
        for preset in ("2bit", "2.5bit", "3bit", "4bit")
    ]
    weights = [size["weights_bytes"] for size in sizes]
    assert weights == sorted(weights)
    assert weights[0] == pytest.approx(343e9, rel=0.01)
    refused = call("kimi-k2.6", "--machines", "m5-max-128", "--preset", "2bit", "--expert-bits", "2")
    assert isinstance(refused.exception, UsageError)


def test_another_ssd_changes_the_prediction() -> None:
    slow, fast = (
        json.loads(call("kimi-k2.6", "--machines", "m5-max-128", "--ssd", rate, "--json").stdout)
        for rate in ("3", "12")
    )
    assert slow["machines"][0]["ssd"] == {"bytes_per_s": 3e9, "source": "given"}
    assert fast["options"][0]["decode"]["tok_per_s"] > 3 * slow["options"][0]["decode"]["tok_per_s"]
    text = call("kimi-k2.6", "--machines", "m5-max-128x2", "--expert-memory", "20%").stdout
    assert "ssd 20 %" in text or "ssd 19 %" in text
    assert "Zipf's law" in " ".join(text.split())


def test_a_set_memory_for_experts_that_does_not_fit() -> None:
    result = call("kimi-k2", "--machines", "m5-max-128", "--preset", "2bit", "--expert-memory", "200GB")
    assert result.exit_code != 0
    assert result.stdout.startswith("Does not fit with this `--expert-memory`. With `auto` it does.\n")


@pytest.mark.parametrize("option", ["--tokens-a-day", "--electricity", "--years", "--price", "--watts"])
def test_costs_that_json_cannot_hold_are_refused(option: str) -> None:
    assert call("kimi-k2", "--machines", "m3-ultra-512x2", "--cost", option, "inf").exit_code == 2


@pytest.mark.parametrize("rate", ["0", "inf", "nan"])
def test_a_rate_of_an_ssd_that_does_not_exist(rate: str) -> None:
    assert call("kimi-k2", "--ssd", rate).exit_code == 2
