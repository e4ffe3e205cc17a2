"""The strategy that a command chooses: with real stores of kimi-mini, and with facts of hosts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cli.model_size import memory_requirement
from kimi_mlx.cli.placement import choose_placement, choose_placement_on_hosts, with_placement
from kimi_mlx.cluster.doctor.doctor import Diagnosis, with_model_need
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest, check_hosts
from kimi_mlx.cluster.hosts.facts import Facts, HeldStore
from kimi_mlx.cluster.hosts.host import Host, Hostfile
from kimi_mlx.cluster.hosts.ssh import ScriptResult
from kimi_mlx.cluster.network.links import LinkSpeed, Network
from kimi_mlx.cluster.network.measure_networks import Link
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.calibration import Calibration, Times
from kimi_mlx.planner.model_shape import ModelShape, known_shape
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.units import GIB
from tests.command import call

K2 = "mlx-community/Kimi-K2-Instruct-4bit"
NETWORK = Network("ethernet", ("10.0.0.1", "10.0.0.2"), ("en0", "en0"))


@pytest.fixture(autouse=True)
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))


def studios(round_trip_s: float = 300e-6, memory_gib: tuple[int, int] = (512, 512)) -> Diagnosis:
    known = {
        host: Facts(host, True, system="Darwin", chip="Apple M3 Ultra", memory_bytes=size * GIB, wired_limit_mb=0)
        for host, size in zip(("mac-a", "mac-b"), memory_gib, strict=True)
    }
    link = Link(NETWORK, LinkSpeed(round_trip_s, 1e9))
    return Diagnosis(("mac-a", "mac-b"), known, (), (link,), NETWORK)


def request(*envs: str) -> DoctorRequest:
    return DoctorRequest(Hostfile((Host("mac-a"), Host("mac-b")), envs=envs), memory_requirement("kimi-k2"))


def held(rank: int, placement: str, commit: str = "a" * 40) -> HeldStore:
    repository = request().need.repository
    assert repository is not None
    return HeldStore(repository, commit, placement, rank, "", 10**9)


def with_stores(diagnosis: Diagnosis, a: list[HeldStore], b: list[HeldStore]) -> Diagnosis:
    stores = {"mac-a": tuple(a), "mac-b": tuple(b)}
    facts = {host: replace(known, stores=stores[host]) for host, known in diagnosis.facts.items()}
    return replace(diagnosis, facts=facts)


def test_a_store_decides_and_another_strategy_needs_a_download() -> None:
    target = resolve_model_name("kimi-mini")
    assert choose_placement(target, 2, None).strategy == "hybrid"
    for strategy in ("tensor", "pipeline:2:2"):
        done = call("download", "kimi-mini", "--ranks", "2", "--strategy", strategy)
        assert done.returncode == 0, done.stderr
    assert choose_placement(target, 2, None).strategy == "pipeline"  # the newest
    assert choose_placement(target, 3, None).strategy == "hybrid"
    assert choose_placement(target, 2, "expert").strategy == "expert"
    (tensor,) = Path(os.environ["KIMI_MLX_STORES"]).glob("*/*/tensor-2-*/rank-0/manifest.json")
    os.utime(tensor, (4e9, 4e9))
    assert choose_placement(target, 2, None).strategy == "tensor"
    again = call("download", "kimi-mini", "--ranks", "2")
    assert "kimi-mini is on this machine" in again.stderr
    assert "tensor over 2 ranks: as it is stored on this machine" in again.stderr


@pytest.mark.slow
@pytest.mark.ranks
def test_json_answers_contain_the_placement() -> None:
    words = ("chat", "-p", "Hello", "-t", "0", "--max-tokens", "8", "--json")
    alone = json.loads(call(*words).stdout)
    uneven = json.loads(call(*words, "--ranks", "2", "--strategy", "pipeline:6:2").stdout)
    assert uneven["text"] == alone["text"]
    assert uneven["placement"] == {"strategy": "pipeline:3:1", "reason": "--strategy overrides the choice"}
    assert alone["placement"]["strategy"] == "hybrid"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("chat", "--strategy", "vertical"), "unknown strategy `vertical`"),
        (("chat", "--strategy", "tensor:0:1"), "has invalid weights"),
        (("chat", "--ranks", "2", "--strategy", "tensor:1:2:3", "-p", "x"), "3 weights, but there are 2 ranks"),
        (("bench", "--ranks", "2", "--strategy", "tensor:1"), "1 weights, but there are 2 ranks"),
        (("download", "--ranks", "2", "--strategy", "tensor:1:2:3"), "3 weights, but there are 2 ranks"),
        (("download", "--strategy", "tensor"), "--strategy needs --ranks"),
        (("launch", "--hosts", "a,b", "check", "--strategy", "tensor:1:2:3"), "3 weights, but there are 2 ranks"),
        (("launch", "--hosts", "a,b", "download", "--strategy", "none"), "unknown strategy `none`"),
    ],
)
def test_invalid_strategies_exit_with_2(words: tuple[str, ...], message: str) -> None:
    done = call(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())


def test_local_ranks_are_measured_unless_something_decides() -> None:
    measured: list[ModelShape] = []

    def calibrate(shape: ModelShape) -> Calibration | None:
        measured.append(shape)
        return calibration if len(measured) == 1 else None

    times = {name: Times(seconds, seconds) for name, seconds in (("single", 2.0), ("hybrid", 1.5), ("tensor", 1.4))}
    heads, message = {"single": 1.0, "split": 0.5}, Times(1.0, 1.0)
    calibration = Calibration(2, 61, times, heads, sums=message, gathers=message, hops=message)
    shape = known_shape("kimi-k2")
    assert choose_placement(None, 2, None, calibrate, shape).strategy == "pipeline"
    assert choose_placement(None, 2, None, calibrate, shape).strategy == "hybrid"  # nothing could be measured
    assert choose_placement(None, 2, "tensor", calibrate, shape).strategy == "tensor"
    assert choose_placement(None, 1, None, calibrate, shape).strategy == "hybrid"
    assert choose_placement(resolve_model_name("kimi-mini"), 2, None, calibrate).strategy == "hybrid"
    assert measured == [shape, shape]


def test_hosts_use_the_planners_choice() -> None:
    slow = choose_placement_on_hosts(studios(2.4e-3), request(), None)
    assert slow.strategy == "pipeline"
    assert "tok/s predicted, hybrid" in slow.reason
    assert choose_placement_on_hosts(replace(studios(), backend="jaccl"), request(), None).strategy == "hybrid"
    assert (
        choose_placement_on_hosts(replace(studios(), backend="jaccl"), request("MLX_METAL_FAST_SYNCH=1"), None).strategy
        == "tensor"
    )
    assert choose_placement_on_hosts(studios(), request(), "expert:4:2").strategy == "expert:2:1"
    with pytest.raises(UsageError):
        choose_placement_on_hosts(studios(), request(), "expert:1:2:3")


def test_hosts_use_the_strategy_of_their_stores() -> None:
    uneven = "pipeline_3_1-2-aaaaaa"
    stored = with_stores(studios(), [held(0, "tensor-2-bbbbbb"), held(0, uneven)], [held(1, uneven)])
    assert choose_placement_on_hosts(stored, request(), None).strategy == "pipeline:3:1"
    newest = with_stores(studios(), [held(0, "tensor-2-bbbbbb"), held(0, uneven)], [])
    assert choose_placement_on_hosts(newest, request(), None).strategy == "tensor"  # the other host downloads its part
    others = with_stores(studios(), [held(0, "tensor-3-bbbbbb")], [held(0, uneven)])
    assert "stored" not in choose_placement_on_hosts(others, request(), None).reason


def test_hosts_with_other_chips_use_pipeline() -> None:
    diagnosis = studios()
    facts = {**diagnosis.facts, "mac-b": replace(diagnosis.facts["mac-b"], chip="Apple M4 Max")}
    unequal = replace(diagnosis, facts=facts)
    choice = choose_placement_on_hosts(unequal, request(), None)
    reason = "the only strategy for hosts that differ: `mac-a` has Apple M3 Ultra, `mac-b` has Apple M4 Max"
    assert (choice.strategy, choice.reason) == ("pipeline", reason)
    assert len(choice.memory) == 2
    stored = with_stores(unequal, [held(0, "hybrid-2-bbbbbb")], [held(1, "hybrid-2-bbbbbb")])
    assert choose_placement_on_hosts(stored, request(), None).strategy == "pipeline"
    uneven = "pipeline_3_1-2-aaaaaa"
    stored = with_stores(unequal, [held(0, uneven)], [held(1, uneven)])
    assert choose_placement_on_hosts(stored, request(), None).strategy == "pipeline:3:1"
    assert choose_placement_on_hosts(unequal, request(), "tensor").strategy == "tensor"  # refused by check_kernels


def test_memory_is_checked_for_the_chosen_placement() -> None:
    """578 GB fit on 512 and 192 GB in proportion to memory, not evenly; stores of another placement do not count."""
    hosts, diagnosis = request(), studios(2.4e-3, (512, 192))
    answers = {host: ScriptResult(host, 0, "", "", 0.1) for host in diagnosis.hosts}
    even = check_hosts(hosts, diagnosis.facts, answers)
    diagnosis = with_stores(replace(diagnosis, findings=tuple(even)), [], [held(1, "hybrid-2-aaaaaa")])
    assert [(finding.host, finding.state) for finding in even if finding.check == "memory"] == [
        ("mac-a", "ok"),
        ("mac-b", "problem"),
    ]
    for strategy, states in (("pipeline:3:1", ["ok", "ok"]), ("pipeline", ["ok", "problem"])):
        choice = choose_placement_on_hosts(diagnosis, hosts, strategy)
        need = with_placement(hosts.need, choice, 2, expert_memory=ALL_EXPERTS)
        after = with_model_need(diagnosis, replace(hosts, need=need), strategy)
        assert [finding.state for finding in after.findings if finding.check == "memory"] == states
        streamed = with_model_need(diagnosis, replace(hosts, need=with_placement(hosts.need, choice, 2)), strategy)
        states = {finding.state for finding in streamed.findings if finding.check in ("memory", "wired limit")}
        assert "problem" not in states  # what does not fit is read from the SSD
        assert len(after.findings) == len(even)


def test_models_doctor_and_plan_count_the_same_memory() -> None:
    lone = DoctorRequest(Hostfile((Host("mac-a"),)), memory_requirement("kimi-k2"))
    facts = {"mac-a": Facts("mac-a", True, system="Darwin", chip="Apple M3 Ultra", memory_bytes=512 * GIB)}
    diagnosis = Diagnosis(("mac-a",), facts, ())
    need = with_placement(lone.need, choose_placement_on_hosts(diagnosis, lone, None), 1)
    (row,) = (row for row in json.loads(call("models", "--json").stdout) if row["alias"] == "kimi-k2")
    plan = json.loads(call("plan", "kimi-k2", "--machines", "m3-ultra-512", "--expert-memory", "all", "--json").stdout)
    planned = plan["options"][0]["memory"][0]["needed_bytes"]
    assert need.memory_bytes(facts["mac-a"], [0], 1) == row["minimum_memory_bytes"] == planned


def test_a_model_that_is_not_here_needs_disk_space_for_its_download() -> None:
    lone = DoctorRequest(Hostfile((Host("localhost"),)), memory_requirement("kimi-k2.6"))
    facts = {"localhost": Facts("localhost", True, memory_bytes=512 * GIB, disk_free_bytes=10**9, stores_folder="/s")}
    answers = {"localhost": ScriptResult("localhost", 0, "", "", 0.1)}
    (disk,) = (finding for finding in check_hosts(lone, facts, answers) if finding.check == "disk")
    assert (disk.state, disk.message) == ("problem", "needs 595.1 GB; 1.0 GB are free for `/s`")
