"""`kimi-mlx doctor`: its report at several widths, as JSON, and wrong usage."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import kimi_mlx
from kimi_mlx.cli.app import app
from kimi_mlx.cli.doctor_json import to_dict
from kimi_mlx.cli.doctor_report import next_step, remedy_lines, report
from kimi_mlx.cli.model_size import memory_requirement
from kimi_mlx.cluster.doctor.doctor import Diagnosis
from kimi_mlx.cluster.doctor.payloads import all_payloads
from kimi_mlx.cluster.doctor.self_test import SelfTest, Timing
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.host import Host, Hostfile
from kimi_mlx.cluster.network.links import LinkSpeed, Network
from kimi_mlx.cluster.network.measure_networks import Link
from kimi_mlx.errors import ConfigError, HostfileError, UsageError
from kimi_mlx.parallel.all_reduce_choice import AllReduceChoice, AllReduceTiming
from tests.unit.cluster.doctor.test_host_checks import MAC, OTHER

TB = Network("thunderbolt", ("10.78.1.11", "10.78.1.12"), ("en5", "en5"))
LAN = Network("ethernet", ("10.77.1.11", "10.77.1.12"), ("en0", "en0"))
LONG = 'sudo networksetup -setnetworkserviceenabled "Thunderbolt Bridge" off && sudo ifconfig bridge0 deletem en1'
BOTH = "mac-a, mac-b"
MINI_FOLDER = Path(kimi_mlx.__file__).parent / "models" / "kimi-mini"
MINI = memory_requirement("kimi-mini")
K2 = memory_requirement("kimi-k2")

TIMINGS = tuple(Timing(each, 0.0003, 0.0008, 100) for each in all_payloads(7168, 163840, 2, 512))
SUMS = AllReduceChoice(
    324_000,
    (AllReduceTiming(8, 114_688, 0.0003, 0.0006, 7), AllReduceTiming(64, 917_504, 0.0021, 0.0012, 7)),
    is_same_bits=True,
    seconds=0.12,
)
GOOD = Diagnosis(
    ("mac-a", "mac-b"),
    {"mac-a": MAC, "mac-b": OTHER},
    (
        Finding("mac-a", "reachable", "ok", "answered in 400 ms"),
        Finding("mac-a", "disk", "ok", "800 GB are free"),
        Finding("mac-b", "versions", "ok", "as on `mac-a`"),
        Finding(BOTH, "link", "ok", "Thunderbolt"),
    ),
    (Link(TB, LinkSpeed(0.0004, 6e9)), Link(LAN, None, ("`mac-a` to `mac-b` at 10.77.1.12: refused",))),
    TB,
    hostfile=Hostfile((Host("mac-a", ("10.78.1.11",)), Host("mac-b", ("10.78.1.12",))), "ring"),
    self_test=SelfTest((), TIMINGS, "gpu", SUMS),
)
BAD = Diagnosis(
    ("mac-a", "mac-b"),
    {"mac-a": MAC},
    (
        Finding("mac-a", "bridge", "problem", "the Thunderbolt Bridge is on, " * 4, f"on `mac-a` type: `{LONG}`"),
        Finding("mac-a", "clock", "warning", "7.00 s ahead", "`sudo sntp -sS time.apple.com`"),
        Finding("mac-a", "disk", "ok", "800 GB are free"),
        Finding("mac-b", "reachable", "problem", "`mac-b` refuses connections\n  ssh: refused", "Remote Login"),
    ),
)


def printed(diagnosis: Diagnosis, width: int, is_verbose: bool = False, option: str = "--hosts mac-a,mac-b") -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    for part in report(diagnosis, MINI, option, width, is_verbose):
        console.print(part, soft_wrap=isinstance(part, str), markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("diagnosis", [GOOD, BAD])
def test_lines_fit_the_terminal_and_commands_are_uncut(diagnosis: Diagnosis, width: int) -> None:
    lines = printed(diagnosis, width).splitlines()
    assert [line for line in lines if len(line) > width] == ([LONG] if diagnosis is BAD and width < 107 else [])
    assert diagnosis is GOOD or any(LONG in line for line in lines)


def test_passed_checks_share_a_line_and_symbols_have_text() -> None:
    text = printed(GOOD, 80)
    assert "✓ ok      2 checks    reachable, disk" in text
    assert "answered in 400 ms" not in text
    assert "answered in 400 ms" in printed(GOOD, 80, is_verbose=True)
    assert "Thunderbolt (10.78.1.11, 10.78.1.12)     0.40 ms   48.00  0.30 ms  chosen" in text
    assert "no answer" in text
    assert "Sum of one token (bfloat16): 0.30 ms, 99 of 100 below 0.80 ms" in text
    assert text.endswith("All checks passed. Next:\n  kimi-mlx launch --hosts mac-a,mac-b\n")
    assert "Sums up to 324.0 kB are gathered and added, larger ones use all_sum." in " ".join(text.split())
    verbose = printed(GOOD, 80, is_verbose=True)
    assert "gather of 8 tokens, float32" in verbose
    assert re.search(r"64 +917504 +2\.10 ms +1\.20 ms", verbose)
    text = printed(BAD, 80)
    assert "✗ problem reachable   `mac-b` refuses connections" in text
    assert "! warning clock       7.00 s ahead" in text
    assert "  → `sudo sntp -sS time.apple.com`" in text
    assert "2 problems found. Fix them and run doctor again." in text
    assert text.index("mac-a\n") < text.index("mac-b\n")


def test_the_next_step() -> None:
    assert next_step(GOOD, K2, "--hosts a,b")[1] == "kimi-mlx launch --hosts a,b chat kimi-k2"
    assert next_step(GOOD, K2, "")[1] == "kimi-mlx chat kimi-k2"
    one = Diagnosis(("a",), {}, (Finding("a", "x", "warning", "m", "r"),))
    assert next_step(one, MINI, "") == ("All checks passed (1 warning). Next:", "kimi-mlx chat")


def test_a_remedy_is_wrapped_between_commands() -> None:
    assert remedy_lines("", 80) == []
    assert remedy_lines("type `a b c d e f g h`, then `second command`", 30) == [
        "  → type `a b c d e f g h`,",
        "    then `second command`",
    ]
    assert remedy_lines(f"first `{LONG}`, then `x`", 60) == ["  → first", LONG, "  then `x`"]


def test_json_has_the_whole_report() -> None:
    document = json.loads(json.dumps(to_dict(GOOD, K2)))
    assert (document["ok"], document["model"], document["backend"]) == (True, "kimi-k2", "ring")
    assert document["hosts"]["mac-b"]["python"]["packages"]["mlx"] == "0.32.2"
    assert document["network"]["addresses"] == ["10.78.1.11", "10.78.1.12"]
    assert document["hostfile"]["hosts"][0] == {"ssh": "mac-a", "ips": ["10.78.1.11"]}
    assert document["links"][1] == {**document["links"][1], "measured": None}
    assert len(document["self_test"]["timings"]) == 18
    assert AllReduceChoice.from_dict(document["self_test"]["sums"]) == SUMS
    bad = to_dict(BAD, K2)
    assert (bad["ok"], bad["hosts"]["mac-b"], bad["self_test"]) == (False, None, None)
    assert bad["findings"][0]["remedy"].endswith(f"`{LONG}`")


def test_memory_requirements_of_models() -> None:
    assert (MINI.repository, MINI.is_here) == (None, True)
    assert 10**6 < (MINI.weights_bytes or 0) < 10**8
    assert (K2.weights_bytes, K2.hidden_size, K2.cache_bytes) == (577_600_000_000, 7168, 8192 * 70272)


def run(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, ["doctor", *arguments]).exception


@pytest.mark.slow
def test_the_disk_is_that_of_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))
    hostfile = tmp_path / "one.json"
    hostfile.write_text('[{"ssh": "localhost", "ips": ["127.0.0.1"]}]')

    def findings(*options: str) -> dict[str, dict[str, str]]:
        document = json.loads(CliRunner().invoke(app, ["doctor", "kimi-k2", "--quick", "--json", *options]).stdout)
        return {finding["check"]: finding for finding in document["findings"]}

    plain, launched = findings(), findings("--hostfile", str(hostfile))
    assert plain["model"]["remedy"] == "`kimi-mlx download kimi-k2`"
    assert str(tmp_path / "hub") in plain["disk"]["message"]
    assert launched["model"]["remedy"] == f"`kimi-mlx launch --hostfile {hostfile} download kimi-k2`"
    assert str(tmp_path / "stores") in launched["disk"]["message"]


@pytest.mark.slow
def test_hosts_that_were_not_reached_pass_no_check() -> None:
    hosts = "kimi-mlx-no-host-a.invalid,kimi-mlx-no-host-b.invalid"
    document = json.loads(CliRunner().invoke(app, ["doctor", "--hosts", hosts, "--json"]).stdout)
    assert {finding["host"] for finding in document["findings"] if finding["state"] == "ok"} == {"this machine"}
    states = {each["host"]: each["state"] for each in document["findings"] if each["host"] in hosts.split(",")}
    assert states == dict.fromkeys(hosts.split(","), "problem")


def test_a_report_of_launch_names_its_own_next_step() -> None:
    assert list(report(GOOD, MINI, "--hosts a,b", 80, is_launch=True))[-1] == ""
    assert next_step(BAD, MINI, "--hosts a,b", is_launch=True)[0].endswith("Fix them and run the launch again.")


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments in (["--hosts", "a,b", "--hostfile", "f"], ["--save", "f"], ["--python", "python3"], ["no-model"]):
        assert isinstance(run(*arguments), UsageError)
    assert isinstance(run("--hosts", "a,a"), HostfileError)
    assert isinstance(run(str(tmp_path)), ConfigError)
    file = tmp_path / "two.json"
    file.write_text('[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]')
    error = run("--hostfile", str(file), "--backend", "jaccl")
    assert isinstance(error, HostfileError)
    assert "has no `rdma` devices" in error.message


@pytest.mark.slow
def test_this_machine_and_two_local_ranks_pass_all_checks(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 0, document
    assert [each["check"] for each in document["findings"]] == [
        *("python", "chip", "memory", "disk", "model", "fence", "self-test", "weights", "text"),
    ] or document["hosts"]["localhost"]["system"] == "Darwin"
    file = tmp_path / "local.json"
    file.write_text(json.dumps([{"ssh": "localhost", "ips": ["127.0.0.1"]}] * 2))
    result = CliRunner().invoke(app, ["doctor", "--hostfile", str(file)])
    assert result.exit_code == 0, result.output
    assert "self-test" in result.output


def test_weight_files_with_a_damaged_header_are_a_problem(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MINI_FOLDER, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    result = CliRunner().invoke(app, ["doctor", str(folder), "--quick", "--json"])
    problems = [finding for finding in json.loads(result.stdout)["findings"] if finding["state"] == "problem"]
    assert result.exit_code == 1
    assert [finding["check"] for finding in problems] == ["weights"]
    assert "is truncated: tensor `" in problems[0]["message"]


@pytest.mark.slow
def test_a_tokenizer_without_the_tokens_of_the_template_is_a_problem(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MINI_FOLDER, folder)
    result = CliRunner().invoke(app, ["doctor", str(folder), "--quick", "--json"])
    assert result.exit_code == 0, result.output
    (folder / "tokenizer_config.json").unlink()
    result = CliRunner().invoke(app, ["doctor", str(folder), "--quick", "--json"])
    problems = [finding for finding in json.loads(result.stdout)["findings"] if finding["state"] == "problem"]
    assert result.exit_code == 1
    assert [finding["check"] for finding in problems] == ["text"]
    assert "missing 9 of 9" in problems[0]["message"]
