"""README and docs: links lead somewhere, the help is the help, and the README stays on one page."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kimi_mlx.cli.app import app
from kimi_mlx.planner.backtest import backtest
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.planner.needs import memory_per_host
from kimi_mlx.units import GIB

ROOT = Path(__file__).parents[2]
OTHERS = ("README.md", "CONTRIBUTING.md", "hostfiles/README.md")
PAGES = [*(ROOT / name for name in OTHERS), *sorted(ROOT.glob("docs/*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in headings(target), f"{page.name}: {link}"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_readme_has_at_most_180_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_the_memory_in_the_readme_is_the_planners() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`(?:moonlight|kimi-k2).*?) \| .* \| (\d+) GiB \|", readme, re.MULTILINE)
    assert len(rows) >= 5
    for names, memory in rows:
        for name in re.findall("`(.*?)`", names):
            assert round(memory_per_host(known_shape(name)) / GIB) == int(memory), name


@pytest.mark.slow
def test_the_speeds_in_the_readme_are_the_planners() -> None:
    machines = {
        "two M3 Ultra 512 GB, RDMA": "m3-ultra-512x2",
        "one M3 Ultra 512 GB, raised GPU limit": "m3-ultra-512",
        "one M4 Max 128 GB": "m4-max-128",
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*?)`.*? \| (.*?) \| ([\d.]+) \| ([\d.]*) ?\| ([\d,]+) \|$", readme, re.MULTILINE)
    assert {macs for _, macs, *_ in rows} == machines.keys()
    for model, macs, decode, drafted, prefill in rows:
        words = ["plan", model, "--machines", machines[macs]]
        option = best_option(words)
        assert rounded(option["decode"]) == float(decode), model
        assert round(option["prefill"]["tok_per_s"]) == int(prefill.replace(",", "")), model
        if drafted:
            assert rounded(best_option([*words, "--draft", "auto"])["drafted"]) == float(drafted), model


def rounded(speed: dict[str, float]) -> float:
    """Return a speed with three digits."""
    return float(f"{speed['tok_per_s']:.3g}")


def best_option(words: list[str]) -> dict[str, Any]:
    """Return the option that a plan chooses."""
    document = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    return document["options"][document["choice"]]


@pytest.mark.slow
def test_the_table_of_streaming_is_the_planners() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_streaming_docs.py"))
    text = (ROOT / "docs" / "streaming.md").read_text(encoding="utf-8")
    assert text == script["page"](text), "run scripts/make_streaming_docs.py"


def test_the_page_of_streaming_has_all_sizes_and_errors() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_streaming_docs.py"))
    text = (ROOT / "docs" / "streaming.md").read_text(encoding="utf-8")
    assert script["row"]("m5-max-128", "2bit") in text, "run scripts/make_streaming_docs.py"
    assert {"64", "128", "256"} <= {machines.rpartition("-")[2] for machines in script["MACHINES"]}
    for comparison in backtest():
        if comparison.is_streamed:
            numbers = f"{comparison.published:.1f} | {comparison.predicted:.1f} | {100 * comparison.error:+.0f} %"
            assert f"| {comparison.metric} | {numbers} |" in text


def test_cli_page_is_the_help() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_cli_docs.py"))
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == script["page"](), "run scripts/make_cli_docs.py"
