"""The doctor's checks of all hosts together: what must be the same everywhere. Pure: facts in, findings out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from kimi_mlx.cluster.doctor.host_checks import INSTALL
from kimi_mlx.cluster.hosts.facts import Facts, HeldStore
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.versions import PACKAGES


def check_versions(hosts: Sequence[Facts]) -> list[Finding]:
    """Whether Python's minor version, kimi-mlx (its code too), mlx and mlx-lm are those of the first host.

    Hosts without a Python or without kimi-mlx are left to kimi_mlx.cluster.doctor.host_checks.check_python.
    """
    known = {facts.host: _versions(facts) for facts in hosts if facts.python and "kimi-mlx" in facts.python.packages}
    if len(known) < 2:
        return []
    first, *others = known
    findings: list[Finding] = []
    for host in others:
        there, here = known[host], known[first]
        diff = [f"{name} {there[name]} (`{first}`: {here[name]})" for name in here if there[name] != here[name]]
        if diff:
            findings.append(Finding(host, "versions", "problem", "; ".join(diff), INSTALL))
        else:
            findings.append(Finding(host, "versions", "ok", f"as on `{first}`"))
    return findings


def check_front(front: Facts, hosts: Sequence[Facts]) -> list[Finding]:
    """Hosts whose kimi-mlx is not that of this machine, which starts their ranks; it need not be the same otherwise."""
    if front.python is None or front.python.code is None:
        return []
    ours = (front.python.packages.get("kimi-mlx"), front.python.code)
    findings: list[Finding] = []
    for facts in hosts:
        python = facts.python
        if python is None or "kimi-mlx" not in python.packages:
            continue
        theirs = (python.packages["kimi-mlx"], python.code)
        if theirs != ours:
            message = f"kimi-mlx {theirs[0]} (code {theirs[1]}), but this machine has {ours[0]} (code {ours[1]})"
            findings.append(Finding(facts.host, "versions", "problem", message, INSTALL))
    return findings


def check_distinct(hosts: Sequence[Facts], addresses: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Hosts that are the same computer under two names: the same host name, and an address in common."""
    findings: list[Finding] = []
    for number, facts in enumerate(hosts):
        for other in hosts[:number]:
            shared = set(addresses.get(facts.host, ())) & set(addresses.get(other.host, ()))
            if facts.hostname == other.hostname and shared:
                message = f"it is the same computer as `{other.host}`, `{facts.hostname}`"
                remedy = "name each computer once; several ranks on one: `--ranks N`, or hostfiles/two-local.json"
                findings.append(Finding(facts.host, "host", "problem", message, remedy))
    return findings


def _versions(facts: Facts) -> dict[str, str]:
    assert facts.python is not None
    packages = {name: facts.python.packages.get(name, "missing") for name in PACKAGES}
    return {"Python": facts.python.minor, **packages, "kimi-mlx's code": facts.python.code or "missing"}


def check_macos(hosts: Sequence[Facts], is_rdma_wanted: bool) -> list[Finding]:
    """Whether all Macs have the build of the first one; RDMA between different builds is known to fail."""
    macs = [facts for facts in hosts if facts.is_mac]
    if len(macs) < 2:
        return []
    first = macs[0]
    findings: list[Finding] = []
    for facts in macs[1:]:
        message = f"macOS {facts.macos_version} ({facts.macos_build})"
        if facts.macos_build == first.macos_build:
            findings.append(Finding(facts.host, "macOS", "ok", f"{message}, as on `{first.host}`"))
            continue
        findings.append(
            Finding(
                facts.host,
                "macOS",
                "problem" if is_rdma_wanted else "warning",
                f"{message}, but `{first.host}` has {first.macos_version} ({first.macos_build})",
                "update both to the same: System Settings > General > Software Update, or `softwareupdate --list`",
            )
        )
    return findings


Choice = tuple[str, str]
"""Commit (12 digits) and placement of a store."""


def check_stores(
    hosts: Sequence[Facts],
    repository: str,
    ranks: Mapping[str, Sequence[int]],
    wanted: Choice | None = None,
    prefix: str | None = None,
) -> list[Finding]:
    """Whether each host holds the complete stores of its ranks, of the same commit and placement.

    Args:
        hosts: all.
        repository: of the model.
        ranks: host -> its ranks.
        wanted: commit and placement; None for those that most ranks have.
        prefix: of the placements that count; None for all.
    """
    held = {
        facts.host: [
            store
            for store in facts.stores
            if store.repository == repository and store.placement.startswith(prefix or "")
        ]
        for facts in hosts
    }
    right = wanted and (wanted[0][:12], wanted[1])
    right = right or _most_common(held, ranks)
    return [_check_store(facts.host, repository, held[facts.host], ranks.get(facts.host, ()), right) for facts in hosts]


def _choice(store: HeldStore) -> Choice:
    return store.commit[:12], store.placement


def _most_common(held: Mapping[str, Sequence[HeldStore]], ranks: Mapping[str, Sequence[int]]) -> Choice | None:
    """The choice that most ranks have; of equals one for as many ranks as there are."""
    world_size = sum(map(len, ranks.values()))
    counts = Counter(_choice(store) for host, stores in held.items() for store in stores if store.rank in ranks[host])

    def worth(choice: Choice) -> tuple[int, bool, Choice]:
        return counts[choice], f"-{world_size}-" in choice[1], choice

    return max(counts, key=worth, default=None)


def _check_store(
    host: str, repository: str, stores: Sequence[HeldStore], ranks: Sequence[int], right: Choice | None
) -> Finding:
    remedy = f"`kimi-mlx launch --hosts ... download {repository}` fetches what is missing"
    if right is None:
        return Finding(host, "stores", "warning", f"no host has a store of `{repository}` yet", remedy)
    name = f"`{repository}` at {right[0]}, {right[1]}"
    missing = sorted(set(ranks) - {store.rank for store in stores if _choice(store) == right})
    if not missing:
        return Finding(host, "stores", "ok", f"{name}: complete")
    which = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing))
    others = sorted({_choice(store) for store in stores} - {right})
    instead = f"; it has {', '.join(f'{commit}, {placement}' for commit, placement in others)}" if others else ""
    return Finding(host, "stores", "problem", f"{name}: the store of {which} is missing{instead}", remedy)
