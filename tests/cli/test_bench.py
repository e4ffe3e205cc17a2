from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kimi_mlx.bench.sides import BatchResult, RequestBatch, SessionSide
from kimi_mlx.bench.workloads import SHAPES
from kimi_mlx.cli.app import app
from kimi_mlx.errors import EngineError, KimiMlxError, MemoryLimitError, UsageError
from tests.bench.tiny import TINY, write_tiny

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--prompt-tokens", "12,24", "--generation-tokens", "4", "--repeat", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare mlx-lm its C++ compiler, which takes longer than everything else."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")


def bench(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    if isinstance(result.exception, KimiMlxError):
        raise result.exception
    return result


@pytest.mark.slow
def test_the_table_has_a_row_for_each_size(tiny: Path) -> None:
    result = bench(tiny, *QUICK)
    assert result.exit_code == 0, result.output
    sizes = re.findall(r"^ *(\d+)  kimi-mlx  +[\d.]+ \(", result.stdout, re.MULTILINE)
    times = re.findall(r"^ *(\d+)  kimi-mlx  +[\d.]+ / ", result.stdout, re.MULTILINE)
    assert sizes == times == ["12", "24"]
    assert "…" not in result.stdout  # nothing is cut, however narrow the terminal
    assert "4 new tokens; median (min-max) of 2 after 1 warm-up" in result.stdout
    assert "mlx-lm /" not in result.stdout


@pytest.mark.slow
def test_json_is_one_document_on_stdout(tiny: Path) -> None:
    report = json.loads(bench(tiny, *QUICK, "--json").stdout)
    assert [row["prompt_tokens"] for row in report["results"]] == [12, 24]
    assert report["results"][0]["decode_tok_per_s"]["median"] > 0
    assert len(report["runs"]) == 6
    assert sum(run["is_warmup"] for run in report["runs"]) == 2
    assert report["dtype"] == "float32"
    assert report["ratios"] == report["same_tokens"] == report["notes"] == []
    assert report["results"][0]["roofline_share"] > 0
    assert report["roofline"]["bytes_per_s"] > 0
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]", report["date"])


@pytest.mark.slow
def test_depth_and_several_at_once_make_a_case_each(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    cases = ["--prompt-tokens", "12", "--depth", "0,20", "--concurrency", "1,3"]
    result = bench(tiny, *cases, "--generation-tokens", "4", "--repeat", "1", "--markdown", "--output", file)
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("|")]
    assert [row[:4] for row in rows[2:]] == [
        ["12", depth, count, "kimi-mlx"] for depth in ("0", "20") for count in ("1", "3")
    ]
    report = json.loads(file.read_text())
    assert [(row["depth"], row["concurrency"]) for row in report["results"]] == [(0, 1), (0, 3), (20, 1), (20, 3)]
    assert {request["cached_tokens"] for request in report["runs"][-1]["requests"]} == {20}


@pytest.mark.slow
def test_images_are_encoded_apart_from_prefill() -> None:
    images = ["--images", "0,2", "--image-size", "60x40", "--prompt-tokens", "8", "--generation-tokens", "2"]
    report = json.loads(bench("kimi-mini-vl", *images, "--repeat", "1", "--json").stdout)
    without, with_images = report["results"]
    assert without["encoding"] is None
    assert with_images["images"] == 2
    assert with_images["encoding"]["image_tokens"] == 12
    assert with_images["encoding"]["encode_s"]["median"] > 0
    assert with_images["encoding"]["prefill_s"]["median"] > 0
    assert report["towers"] == []


@pytest.mark.sweep  # tests/bench/test_report.py draws it without a run
def test_the_plot_is_drawn(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench(tiny, *QUICK, "--plot", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10000


def test_without_matplotlib_nothing_is_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix, has_pip, command in (
        ("/home/x/.local/pipx/venvs/kimi-mlx", True, "pipx inject kimi-mlx matplotlib"),
        ("/home/x/.local/share/uv/tools/kimi-mlx", False, f"uv pip install --python {sys.executable} matplotlib"),
        ("/home/x/venv", True, f"{sys.executable} -m pip install matplotlib"),
    ):
        monkeypatch.setattr("sys.prefix", prefix)
        monkeypatch.setattr("kimi_mlx.bench.plot.find_spec", lambda name: None)
        monkeypatch.setattr("kimi_mlx.install_command.find_spec", lambda name, has=has_pip: has or None)
        with pytest.raises(UsageError, match="needs matplotlib") as caught:
            bench(tiny, "--plot", "out.png")
        assert caught.value.hint == f"run `{command}`"


@pytest.mark.sweep  # tests/bench/test_sides.py has both sides on two ranks
@pytest.mark.ranks
def test_against_mlx_lm_on_two_ranks(tiny: Path) -> None:
    report = json.loads(bench(tiny, *QUICK, "--ranks", "2", "--against", "mlx-lm", "--json").stdout)
    sides = {row["side"] for row in report["results"]}
    assert sides == {"kimi-mlx", "mlx-lm tensor", "mlx-lm pipeline"}
    assert len(report["ratios"]) == 2
    assert all(ratio["decode"] > 0 for ratio in report["ratios"])
    assert all(agreement["equal"] == agreement["answers"] == 6 for agreement in report["same_tokens"])


@pytest.mark.slow
def test_streamed_experts_are_compared_with_all_in_memory() -> None:
    quick = ["--prompt-tokens", "8", "--generation-tokens", "4", "--repeat", "1", "--expert-memory", "35%"]
    report = json.loads(bench("kimi-mini", *quick, "--against", "resident", "--json").stdout)
    streamed, resident = report["results"]
    assert (streamed["side"], resident["side"]) == ("kimi-mlx", "resident")
    assert streamed["experts"]["read_bytes_per_token"] > 0
    assert streamed["experts"]["prompt_read_bytes"] > 0
    assert 0 < streamed["experts"]["hit_rate"] < 1
    assert resident["experts"] is None
    assert report["same_tokens"] == [{"side": "resident", "answers": 2, "equal": 2, "first_difference": None}]
    assert {ratio["against"] for ratio in report["ratios"]} == {"resident"}


def test_nothing_is_compared_if_all_experts_are_in_memory() -> None:
    with pytest.raises(UsageError, match="all experts are in memory"):  # after loading: they fit
        bench("kimi-mini", "--prompt-tokens", "8", "--against", "resident")


def test_a_model_that_does_not_fit_beside_the_streamed_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.cli.bench_resident.free_memory_bytes", lambda: 1024**2)
    with pytest.raises(MemoryLimitError, match=r"needs [\d.]+ MiB beside the one that reads them; 1.0 MiB are free"):
        bench("kimi-mini", "--prompt-tokens", "8", "--expert-memory", "35%", "--against", "resident")


@pytest.mark.slow
def test_synthetic_checkpoints_are_made_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(SHAPES, "deep", TINY)  # pyright: ignore[reportArgumentType]
    result = bench("--synthetic", "deep", "--prompt-tokens", "8", "--generation-tokens", "2", "--repeat", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("deep, float32, 1 rank,")
    assert len(list((tmp_path / "kimi-mlx" / "synthetic").iterdir())) == 1


def test_a_model_without_vision_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(EngineError, match="`kimi-mini` does not see images"):
        bench("--images", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthetic", "wide", "kimi-mini"], "exclude each other"),
        (["--prompt-tokens", "many"], "`many`, not whole numbers"),
        (["--prompt-tokens", "0"], "at least 1 token"),
        (["no-such-model"], "no model `no-such-model`"),
        (["--ranks", "65"], "between 1 and 64"),
        (["--depth", "deep"], "--depth is `deep`, not whole numbers"),
        (["--depth", "-1"], "at least 0"),
        (["--depth", "0,"], "not whole numbers"),
        (["--concurrency", "0"], "not between 1 and 64"),
        (["--concurrency", "two"], "--concurrency is `two`"),
        (["--depth", "65000"], "65576 tokens, but the model's context has 65536"),
        (["--link-delay-ms", "4"], "for several ranks"),
        (["--link-delay-ms", "nan", "--ranks", "2"], "nan, not from 0 to 1000"),
        (["--images", "many"], "--images is `many`, not whole numbers"),
        (["--images", "101"], "101 images are not between 0 and 100"),
        (["--images", "1", "--image-size", "0x10"], "--image-size is `0x10`, not a width and a height"),
        (["--images", "1", "--image-size", "1024"], "--image-size is `1024`"),
        pytest.param(["--image-size", "5" * 5000 + "x10"], "not a width and a height", id="many digits"),
        (["--images", "1", "--against", "mlx-lm"], "mlx-lm does not see images"),
        (["--images", "1", "--against", "mlx-lm-tensor"], "mlx-lm does not see images"),
        (["--against", "mlx-vlm"], "compares vision towers"),
        (["--expert-memory", "all", "--against", "resident"], "all experts are in memory"),
        (["--json", "--markdown"], "exclude each other"),
        (["--output", "/no/such/folder/out.json"], "--output: cannot write `/no/such/folder/out.json`: No such"),
        (["--output", "."], "--output: cannot write `.`: Is a directory"),
    ],
)
def test_wrong_usage_is_an_error(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(*arguments)


def test_a_known_model_without_vision_is_refused_before_it_is_downloaded() -> None:
    with pytest.raises(KimiMlxError, match="`kimi-k2` does not see images"):
        bench("kimi-k2", "--images", "1")


def test_a_prompt_beyond_the_context_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", max_position_embeddings=64)
    with pytest.raises(UsageError, match=r"depth 0, prompt 512 and answer 64 need 576 tokens, .* has 64"):
        bench(folder)


@pytest.mark.ranks
def test_more_ranks_than_pieces_are_refused(tiny: Path) -> None:
    with pytest.raises(KimiMlxError, match="but there are 3 ranks"):
        bench(tiny, *QUICK, "--ranks", "3")


def children(pid: int) -> list[int]:
    """Running processes that `pid` has started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(row[0]) for row in rows if row[1] == str(pid) and not row[2].startswith("Z")]


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def wait_for(condition: Callable[[], bool], patience_s: float = 30) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.sweep), (signal.SIGKILL, -9)],
)
def test_no_process_outlives_the_command(tiny: Path, number: signal.Signals, code: int) -> None:
    script = str(ROOT / "scripts" / "benchmark.py")
    command = [sys.executable, script, str(tiny), "--against", "mlx-lm", "--ranks", "2", "--repeat", "100000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: len(children(process.pid)) >= 4)  # two ranks of ours, two of mlx-lm
        ranks = children(process.pid)
        process.send_signal(number)
        assert process.wait(20) == code
    wait_for(lambda: not any(map(is_running, ranks)), 10)


@pytest.mark.slow
def test_complete_runs_are_shown_after_ctrl_c(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = SessionSide.run, list[BatchResult]()

    def run_or_interrupt(side: SessionSide, batch: RequestBatch) -> BatchResult:
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        done.append(run(side, batch))
        return done[-1]

    monkeypatch.setattr(SessionSide, "run", run_or_interrupt)
    file = tmp_path / "out.json"
    result = bench(tiny, "--prompt-tokens", "12", "--generation-tokens", "4", "--concurrency", "2", "--output", file)
    assert result.exit_code == 130
    assert "interrupted after 3 of 6 runs" in result.stdout
    report = json.loads(file.read_text())
    assert report["is_complete"] is False
    assert len(report["runs"]) == 3


def test_the_script_is_the_command() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: kimi-mlx bench" in done.stdout
