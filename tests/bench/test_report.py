"""The benchmark's report: JSON, tables, summary, plot."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from kimi_mlx.bench import machine
from kimi_mlx.bench.measure import BenchmarkPlan, Case, Run
from kimi_mlx.bench.plot import DOTTED, is_logarithmic, make_lines, panels_of
from kimi_mlx.bench.prediction import calibrated_predictor, predictor
from kimi_mlx.bench.report import Report
from kimi_mlx.cli.bench_output import Output
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.calibration import Calibration, Times
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.model_shape import known_shape
from tests.bench.runs import make_run

PLAN = BenchmarkPlan((100,), 11, warmup=1, repeat=3)
RUNS = [
    make_run(side, i, *rates, ids=ids)
    for side, rates, ids in (
        ("kimi-mlx", (400, 61), tuple(range(11))),
        ("mlx-lm tensor", (200, 20), tuple(range(11))),
        ("mlx-lm pipeline", (100, 30), (*range(10), 99)),
    )
    for i in range(-1, 3)
]


class IdleSide:
    not_batched_because = None

    def __init__(self, name: str):
        self.name = name

    def run(self, batch: object) -> object:
        raise NotImplementedError


def make_report(runs: list[Run] = RUNS, plan: BenchmarkPlan = PLAN) -> Report:
    settings = {
        "model": "wide",
        "ranks": 2,
        "dtype": "float32",
        "link_delay_ms": 4.0,
        "machine": {**machine.machine(), "load_average_1min": 0.1, "processors": 2},
        "versions": machine.versions(),
        "commit": machine.commit(),
        "roofline": {"bytes_per_s": 2e9, "source": "measured"},
    }
    sides = [IdleSide(name) for name in dict.fromkeys(run.side for run in runs)]
    return Report(plan, settings, runs, sides, lambda case, rate: rate / 1000)  # pyright: ignore[reportArgumentType]


def test_the_report_is_json_with_every_raw_run() -> None:
    document = json.loads(json.dumps(make_report().to_dict(), allow_nan=False))
    assert len(document["runs"]) == len(RUNS)
    assert len(document["runs"][0]["requests"][0]["arrivals_s"]) == 11
    ours = document["results"][0]
    assert (ours["side"], ours["prompt_tokens"], ours["depth"], ours["concurrency"]) == ("kimi-mlx", 100, 0, 1)
    assert ours["decode_tok_per_s"]["max"] == pytest.approx(61)
    assert ours["ttft_s"]["p90"] == pytest.approx(0.25)
    assert ours["roofline_share"] == pytest.approx(0.061)
    assert document["versions"]["mlx-lm"]
    assert document["machine"]["processors"] >= 1
    assert document["commit"] is None or len(document["commit"].rstrip("+")) == 40
    assert document["is_complete"]


def test_the_tables_show_each_side() -> None:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(*make_report().tables())
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for cell in (
        "61.0 (61.0-61.0)",
        "mlx-lm pipeline",
        "953.7 MiB + 1.9 GiB",
        "6.1%",
        "250 / 250 / 250",
        "16.4 / 16.4",
    ):
        assert cell in text
    assert "depth" not in text
    assert "at once" not in text


def test_empty_columns_are_hidden() -> None:
    plan = BenchmarkPlan((100,), 11, warmup=0, repeat=1, depth=(50,), concurrency=(2,))
    text = make_report([make_run("kimi-mlx", 0, 100, 10, case=Case(50, 100, 2), energy_j=44)], plan).markdown()
    header, rule, row = (line for line in text.splitlines() if line.startswith("|"))
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert (cells["depth"], cells["at once"], cells["J/token"]) == ("50", "2", "2.00")
    assert cells["together tok/s"] == "5.5 (5.5-5.5)"
    assert rule.count("---") == 1


def test_the_heading_names_the_set_up() -> None:
    first, second = make_report().heading()
    assert first.startswith("wide, float32, 2 ranks 4 ms apart each way, 11 new tokens; median (min-max) of 3")
    assert "load" in second


def test_a_busy_machine_is_named() -> None:
    report = make_report()
    assert not any(line.startswith("busy") for line in report.summary())
    report.settings["machine"]["load_average_1min"] = 3.5
    assert any("load 3.5 before the start, on 2 processors" in line for line in report.summary())


def test_the_summary_has_ratios_and_agreement() -> None:
    lines = make_report().summary()
    assert lines == [
        "prompt 100: kimi-mlx / mlx-lm = 2.00 (2.00-2.00) in prefill (`mlx-lm tensor`), "
        "2.03 (2.03-2.03) in decode (`mlx-lm pipeline`)",
        "mlx-lm tensor: same tokens as kimi-mlx in all 4 answers",
        "mlx-lm pipeline: same tokens as kimi-mlx in 0 of 4 answers; earliest difference at token 10",
        "roofline: 2.0 GB/s (measured)",
    ]


def test_several_cases_have_a_table_of_ratios() -> None:
    cases = [Case(8192, 16, 1), Case(8192, 64, 1)]
    sides = (("kimi-mlx", (40.0, 60.0)), ("mlx-lm", (10.0, 20.0)))
    runs = [
        make_run(side, repetition, rate, 5.0, case=case)
        for case in cases
        for side, rates in sides
        for repetition, rate in enumerate(rates)
    ]
    report = make_report(runs)
    lines = report.markdown().splitlines()
    assert "| prompt | depth | at once | prefill ratio | decode ratio | together ratio | against |" in lines
    assert "| 16 | 8192 | 1 | 3.33 (3.00-4.00) | 1.00 (1.00-1.00) |  | mlx-lm |" in lines
    assert not any("kimi-mlx / mlx-lm" in line for line in lines)
    assert len(report.tables()) == 3
    assert report.to_dict()["ratios"][0]["spread"] == {"median": 3.5, "min": 3.0, "max": 4.0}


def test_json_and_plot_need_two_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="--output and --plot both name"):
        Output(False, False, tmp_path / "out", tmp_path / "." / "out").check()


def test_an_interrupted_report_says_so() -> None:
    report = make_report(RUNS[:-1])
    assert report.summary()[-1] == "interrupted after 11 of 12 runs"
    assert report.to_dict()["is_complete"] is False


@pytest.mark.slow
@pytest.mark.parametrize("runs", [RUNS, RUNS[:4], []], ids=["three sides", "one side", "no runs"])
def test_the_plot_is_a_png(tmp_path: Path, runs: list[Run]) -> None:
    pytest.importorskip("matplotlib")
    from kimi_mlx.bench.plot import save_plot

    save_plot(make_report(runs), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(tmp_path / "out.png") as image:
        rows = np.asarray(image.convert("L"))
    drawn = np.flatnonzero((rows < 255).any(axis=1))
    assert np.diff(drawn).max() < 0.03 * len(rows), "an empty band: the layout was not computed"


def test_a_plot_has_a_line_per_concurrency_and_dotted_predictions() -> None:
    cases = [Case(depth, 128, count) for depth in (0, 8192) for count in (1, 8)]
    runs = [make_run("kimi-mlx", 0, 200.0, 20.0, case=case) for case in cases]
    predict = predictor(known_shape("kimi-k2").config, parse_machines("m3-ultra-512")[0])
    report = replace(make_report(runs), predict=predict)
    decode, first, aggregate = (make_lines(report, panel) for panel in panels_of(report))
    assert sorted(line.label for line in decode) == ["1 at once", "8 at once", "predicted, 1 at once"]
    for line in decode:
        assert [point[0] for point in line.points] == [128, 8320]
    (dotted,) = (line for line in decode if line.style == DOTTED)
    assert dotted.points[0][1] > dotted.points[1][1] > 0
    assert {len(line.points) for line in first} == {1}  # a line per depth
    (deep,) = (line for line in first if line.label == "predicted, 1 at once, depth 8,192")
    (short,) = (line for line in first if line.label == "predicted, 1 at once, depth 0")
    assert deep.points[0][1] > short.points[0][1] > 0
    assert [[point[0] for point in line.points] for line in aggregate] == [[1, 8], [1, 8]]


def test_a_calibration_predicts_cases_with_an_empty_cache() -> None:
    layer, free = Times(0.1, 0.73), Times(0, 0)
    calibration = Calibration(1, 10, {"single": layer}, {"single": 0}, free, free, free)
    predict = calibrated_predictor(calibration, "hybrid")  # one rank: whatever the strategy
    prediction = predict(Case(0, 64, 1))
    assert prediction is not None
    assert prediction.decode_tok_per_s == pytest.approx(1)
    assert prediction.first_token_s == pytest.approx(7.3)
    assert predict(Case(8192, 64, 1)) is predict(Case(0, 64, 2)) is predict(Case(0, 64, 1, 1)) is None
    assert calibrated_predictor(replace(calibration, num_ranks=2), "expert")(Case(0, 64, 1)) is None


@pytest.mark.parametrize(
    ("values", "is_log"), [([], False), ([5], False), ([1, 7], False), ([1, 8], True), ([0, 100], False)]
)
def test_axes_are_logarithmic_where_needed(values: list[float], is_log: bool) -> None:
    assert is_logarithmic(values) == is_log
