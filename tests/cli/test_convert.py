from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kimi_mlx.cli.app import app
from kimi_mlx.errors import KimiMlxError, TextError, UsageError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.config_quantization import Quantization
from tests.checkpoints import FORMATS
from tests.hub import Hub, environment
from tests.processes import start

ROOT = Path(__file__).resolve().parents[2]
INT4, FP8 = FORMATS / "int4-k2.5", FORMATS / "fp8"


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if isinstance(result.exception, KimiMlxError):
        raise result.exception
    return result


def test_the_result_is_printed_in_a_line(tmp_path: Path) -> None:
    result = run(INT4, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path}/out: 4 files, 783.3 kB, 12.68 bits per weight, in ")
    assert "vision" not in result.stderr
    assert load_config(tmp_path / "out").quantization == Quantization(4, 32)


def test_the_vision_tower_is_copied_or_left_out(tmp_path: Path) -> None:
    plan = json.loads(run(INT4, tmp_path / "out", "--dry-run", "--json").stdout)
    assert {row["source"] for row in plan["matrices"] if row["kind"] == "vision tower"} == {"bfloat16"}
    assert {row["target"] for row in plan["matrices"] if row["kind"] == "vision tower"} == {"bfloat16, unchanged"}
    result = run(INT4, tmp_path / "out", "--no-vision")
    assert result.stdout.startswith(f"{tmp_path}/out: 3 files, 405.5 kB, 10.62 bits per weight, in ")
    assert "note: the vision tower is left out, so the result does not see images" in result.stderr
    assert load_config(tmp_path / "out").vision is None


def test_options_reach_the_result(tmp_path: Path) -> None:
    run(FP8, tmp_path / "out", "--expert-bits", "2", "--bits", "bf16", "--group-size", "32")
    config = load_config(tmp_path / "out")
    assert config.quantization_of("model.layers.1.mlp.switch_mlp.up_proj") == Quantization(2, 32)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert block["lm_head"] is False


def test_json_is_one_document(tmp_path: Path) -> None:
    result = run(FP8, tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert report["folder"] == str(tmp_path / "out")
    assert report["files"] == 3
    assert report["files_before"] == 0
    assert report["size_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert report["bits_per_weight"] > 4.5
    assert report["seconds"] > 0
    assert "do not divide" in report["notes"][0]
    assert result.stderr == ""


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = run(INT4, tmp_path / "out", "--expert-bits", "4", "--dry-run")
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert rows[0] == "tensors from to size"
    assert "routed experts INT4, groups of 32 4 bits, groups of 32, unchanged 92.2 kB" in rows
    assert any(row.startswith("attention bfloat16 8 bits, groups of 32 ") for row in rows)
    assert any(row.startswith("router bfloat16 bfloat16, unchanged ") for row in rows)
    assert "nothing has been written" in rows[-1]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_as_json_has_the_same_size(tmp_path: Path) -> None:
    report = json.loads(run(FP8, tmp_path / "out", "--dry-run", "--json").stdout)
    result = json.loads(run(FP8, tmp_path / "out", "--json").stdout)
    assert report["size_bytes"] == result["size_bytes"]
    assert {"kind", "source", "target", "size_bytes"} == report["matrices"][0].keys()


@pytest.mark.parametrize("arguments", [("--bits", "7"), ("--expert-bits", "4.5"), ("--group-size", "48"), ("extra",)])
def test_invalid_options_exit_with_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = run(FP8, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model `nowhere`"):
        run("nowhere", tmp_path / "out")
    with pytest.raises(KimiMlxError, match=r"config\.json` does not exist"):
        run(tmp_path, tmp_path / "out")
    source = shutil.copytree(FP8, tmp_path / "source")
    (source / "model-00001-of-000002.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_in_a_dry_run_too(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="is not empty"):
        run(FP8, tmp_path, "--dry-run")


def test_the_source_itself_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(FP8, tmp_path / "source")
    with pytest.raises(UsageError, match="already contains a model"):
        run(source, source)


SLOW_CONVERT = """
import sys, time
from kimi_mlx.cli.app import main
from kimi_mlx.weights import convert as converter

convert_chunk = converter.convert_chunk
def convert_slowly(*arguments):
    time.sleep(0.02)
    return convert_chunk(*arguments)
converter.convert_chunk = convert_slowly
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_resumed(number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_CONVERT, "convert", str(FP8), str(tmp_path / "out")]
    process = start(command, cwd=ROOT, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "model-00002-of-00003.safetensors.part").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert error.endswith("stopped; run the same command again to resume\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".convert.json",
        "model-00001-of-00003.safetensors",
    ]
    assert "1 of these files are from an earlier run" in run(FP8, tmp_path / "out").stdout


@pytest.mark.slow
def test_a_dry_run_downloads_no_weights(tmp_path: Path) -> None:
    source = INT4
    with Hub({"owner/model": source}) as hub:
        command = [sys.executable, "-m", "kimi_mlx", "convert", "owner/model", str(tmp_path), "--dry-run", "--json"]
        variables = {**os.environ, **environment(hub, tmp_path / "hf")}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        assert sum(count for name, count in hub.sent.items() if name.endswith(".safetensors")) < size / 2
    local = subprocess.run(
        [sys.executable, "-m", "kimi_mlx", "convert", str(source), str(tmp_path / "out"), "--dry-run", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert json.loads(done.stdout)["matrices"] == json.loads(local.stdout)["matrices"]


def test_a_source_without_the_tokens_of_its_template_is_refused_before_the_work(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "kimi_mlx" / "models" / "kimi-mini", source)
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(TextError, match="does not have as special tokens"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
