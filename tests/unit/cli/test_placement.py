"""Which strategy a command takes: on real stores of kimi-mini, and on what hosts have told."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cli.memory_requirement import memory_requirement
from kimi_mlx.cli.placement import choose_placement, choose_placement_on_hosts, with_placement
from kimi_mlx.cluster.doctor.doctor import Diagnosis, with_model_need
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest, check_hosts
from kimi_mlx.cluster.hosts.facts import Facts, HeldStore
from kimi_mlx.cluster.hosts.host import Host, Hostfile
from kimi_mlx.cluster.hosts.ssh import ScriptResult
from kimi_mlx.cluster.network.links import LinkSpeed, Network
from kimi_mlx.cluster.network.measure_networks import Link
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.links import measured_link
from kimi_mlx.store.locate import resolve_model_name
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


def question(*envs: str) -> DoctorRequest:
    return DoctorRequest(Hostfile((Host("mac-a"), Host("mac-b")), envs=envs), memory_requirement("kimi-k2"))


def held(rank: int, placement: str, commit: str = "a" * 40) -> HeldStore:
    repository = question().need.repository
    assert repository is not None
    return HeldStore(repository, commit, placement, rank, "", 10**9)


def with_stores(found: Diagnosis, a: list[HeldStore], b: list[HeldStore]) -> Diagnosis:
    stores = {"mac-a": tuple(a), "mac-b": tuple(b)}
    return replace(found, facts={host: replace(facts, stores=stores[host]) for host, facts in found.facts.items()})


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


@pytest.mark.ranks
def test_every_answer_says_how_it_was_placed() -> None:
    words = ("chat", "-p", "Hello", "-t", "0", "--max-tokens", "8", "--json")
    alone = json.loads(call(*words).stdout)
    uneven = json.loads(call(*words, "--ranks", "2", "--strategy", "pipeline:6:2").stdout)
    assert uneven["text"] == alone["text"]
    assert uneven["placement"] == {"strategy": "pipeline:3:1", "why": "--strategy overrides the choice"}
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
def test_wrong_strategies_are_wrong_usage(words: tuple[str, ...], message: str) -> None:
    done = call(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())


def test_a_slow_link_between_local_ranks() -> None:
    choice = choose_placement(None, 2, None, measured_link(2e-3, 1e9))
    assert choice.strategy == "pipeline"
    assert "1 ms per message" in choice.why


def test_hosts_take_what_the_planner_finds_best() -> None:
    slow = choose_placement_on_hosts(studios(2.4e-3), question(), None)
    assert slow.strategy == "pipeline"
    assert "tok/s predicted, hybrid" in slow.why
    assert choose_placement_on_hosts(replace(studios(), backend="jaccl"), question(), None).strategy == "hybrid"
    assert (
        choose_placement_on_hosts(
            replace(studios(), backend="jaccl"), question("MLX_METAL_FAST_SYNCH=1"), None
        ).strategy
        == "tensor"
    )
    assert choose_placement_on_hosts(studios(), question(), "expert:4:2").strategy == "expert:2:1"
    with pytest.raises(UsageError):
        choose_placement_on_hosts(studios(), question(), "expert:1:2:3")


def test_hosts_take_what_they_have_stored() -> None:
    uneven = "pipeline_3_1-2-aaaaaa"
    found = with_stores(studios(), [held(0, "tensor-2-bbbbbb"), held(0, uneven)], [held(1, uneven)])
    assert choose_placement_on_hosts(found, question(), None).strategy == "pipeline:3:1"
    newest = with_stores(studios(), [held(0, "tensor-2-bbbbbb"), held(0, uneven)], [])
    assert choose_placement_on_hosts(newest, question(), None).strategy == "tensor"  # the other host's part is fetched
    others = with_stores(studios(), [held(0, "tensor-3-bbbbbb")], [held(0, uneven)])
    assert "stored" not in choose_placement_on_hosts(others, question(), None).why


def test_memory_is_checked_for_the_chosen_placement() -> None:
    """578 GB do not fit evenly on 512 and 192 GB, and fit by memory; what is stored in another way does not count."""
    asked, found = question(), studios(2.4e-3, (512, 192))
    answers = {host: ScriptResult(host, 0, "", "", 0.1) for host in found.hosts}
    even = check_hosts(asked, found.facts, answers)
    found = with_stores(replace(found, findings=tuple(even)), [], [held(1, "hybrid-2-aaaaaa")])
    assert [(each.host, each.state) for each in even if each.check == "memory"] == [
        ("mac-a", "ok"),
        ("mac-b", "problem"),
    ]
    for strategy, states in (("pipeline:3:1", ["ok", "ok"]), ("pipeline", ["ok", "problem"])):
        choice = choose_placement_on_hosts(found, asked, strategy)
        need = with_placement(asked.need, choice, 2)
        after = with_model_need(found, replace(asked, need=need))
        assert [each.state for each in after.findings if each.check == "memory"] == states
        assert len(after.findings) == len(even)
