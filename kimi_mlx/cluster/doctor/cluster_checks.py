"""The doctor's checks that compare hosts with each other. Pure functions from facts to findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from kimi_mlx.cluster.doctor.host_checks import INSTALL
from kimi_mlx.cluster.hosts.facts import Facts, HeldStore
from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.cluster.hosts.versions import PACKAGES


def check_versions(hosts: Sequence[Facts]) -> list[Finding]:
    """Check that Python's minor version, kimi-mlx (version and code), mlx and mlx-lm are the same as on the first host.

    Skips hosts without Python or kimi-mlx, which kimi_mlx.cluster.doctor.host_checks.check_python reports.
    """
    known = {facts.host: _versions(facts) for facts in hosts if facts.python and "kimi-mlx" in facts.python.packages}
    if len(known) < 2:
        return []
    first, *others = known
    findings: list[Finding] = []
    for host in others:
        theirs, expected = known[host], known[first]
        differences = [
            f"{name} {theirs[name]} (`{first}`: {expected[name]})"
            for name in expected
            if theirs[name] != expected[name]
        ]
        if differences:
            findings.append(Finding(host, "versions", "problem", "; ".join(differences), INSTALL))
        else:
            findings.append(Finding(host, "versions", "ok", f"same as on `{first}`"))
    return findings


def check_front(front: Facts, hosts: Sequence[Facts]) -> list[Finding]:
    """Find hosts whose kimi-mlx differs from that of the front, which starts their ranks. Other versions may differ."""
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
    """Find hosts that are one computer under two names: same host name, and an address in common."""
    findings: list[Finding] = []
    for index, facts in enumerate(hosts):
        for other in hosts[:index]:
            shared = set(addresses.get(facts.host, ())) & set(addresses.get(other.host, ()))
            if facts.hostname == other.hostname and shared:
                message = f"same computer as `{other.host}` (`{facts.hostname}`)"
                remedy = (
                    "name each computer once; for several ranks on one, use `--ranks N` or hostfiles/two-local.json"
                )
                findings.append(Finding(facts.host, "host", "problem", message, remedy))
    return findings


def _versions(facts: Facts) -> dict[str, str]:
    assert facts.python is not None
    packages = {name: facts.python.packages.get(name, "missing") for name in PACKAGES}
    return {"Python": facts.python.minor, **packages, "kimi-mlx's code": facts.python.code or "missing"}


def kernel_difference(hosts: Sequence[Facts]) -> str | None:
    """Return how the chips or MLX builds of hosts differ; None if they are equal, as far as they are known.

    MLX chooses kernels by chip and build, and each sums in an order of its own. All strategies except pipeline compute
    the router on every rank: where two experts score nearly the same, ranks with other kernels choose different ones,
    and the sum then mixes them without any error.
    """
    for describe in (_chip, _mlx_build):
        known = [(facts.host, text) for facts in hosts if (text := describe(facts)) is not None]
        for host, text in known[1:]:
            if text != known[0][1]:
                return f"`{known[0][0]}` has {known[0][1]}, `{host}` has {text}"
    return None


def _chip(facts: Facts) -> str | None:
    return facts.chip


def _mlx_build(facts: Facts) -> str | None:
    if facts.python is None or facts.python.mlx_build is None or "mlx" not in facts.python.packages:
        return None
    return f"mlx {facts.python.packages['mlx']} built for {facts.python.mlx_build}"


def check_kernels(hosts: Sequence[Facts], strategy: str | None = None) -> Finding:
    """Check that all hosts compute with the same kernels, or that the strategy does not need that.

    Args:
        hosts: facts of all hosts.
        strategy: strategy of the ranks; None if it is not chosen yet.
    """
    names = ", ".join(facts.host for facts in hosts)
    difference = kernel_difference(hosts)
    if difference is None:
        return Finding(names, "kernels", "ok", "same chip and MLX build on all hosts")
    if strategy is None or strategy.partition(":")[0] == "pipeline":
        return Finding(names, "kernels", "ok", f"{difference}; the strategy pipeline works with that")
    message = f"{difference}: with the strategy {strategy} they would choose different experts and mix their outputs"
    return Finding(names, "kernels", "problem", message, "leave `--strategy` out, or use `--strategy pipeline`")


def check_macos(hosts: Sequence[Facts], is_rdma_used: bool) -> list[Finding]:
    """Check that all Macs have the same macOS build; RDMA between different builds is known to fail."""
    macs = [facts for facts in hosts if facts.is_mac]
    if len(macs) < 2:
        return []
    first = macs[0]
    findings: list[Finding] = []
    for facts in macs[1:]:
        message = f"macOS {facts.macos_version} ({facts.macos_build})"
        if facts.macos_build == first.macos_build:
            findings.append(Finding(facts.host, "macOS", "ok", f"{message}, same as on `{first.host}`"))
            continue
        findings.append(
            Finding(
                facts.host,
                "macOS",
                "problem" if is_rdma_used else "warning",
                f"{message}, but `{first.host}` has {first.macos_version} ({first.macos_build})",
                "update both to one version: System Settings > General > Software Update, or `softwareupdate --list`",
            )
        )
    return findings


StoreVersion = tuple[str, str]
"""Commit (12 digits) and placement of a store."""


def check_stores(
    hosts: Sequence[Facts],
    repository: str,
    ranks: Mapping[str, Sequence[int]],
    expected: StoreVersion | None = None,
    prefix: str | None = None,
) -> list[Finding]:
    """Check that each host holds the complete stores of its ranks, with the same commit and placement.

    Args:
        hosts: facts of all hosts.
        repository: repository of the model.
        ranks: host -> its ranks.
        expected: commit and placement; None for those that most ranks have.
        prefix: prefix of the placements to consider; None for all placements.
    """
    stores_by_host = {
        facts.host: [
            store
            for store in facts.stores
            if store.repository == repository and store.placement.startswith(prefix or "")
        ]
        for facts in hosts
    }
    version = (expected[0][:12], expected[1]) if expected else _most_common(stores_by_host, ranks)
    return [
        _check_store(facts.host, repository, stores_by_host[facts.host], ranks.get(facts.host, ()), version)
        for facts in hosts
    ]


def _version_of(store: HeldStore) -> StoreVersion:
    return store.commit[:12], store.placement


def _most_common(
    stores_by_host: Mapping[str, Sequence[HeldStore]], ranks: Mapping[str, Sequence[int]]
) -> StoreVersion | None:
    """Return the version that most ranks have; on a tie, prefer one that is split for this number of ranks."""
    world_size = sum(map(len, ranks.values()))
    counts = Counter(
        _version_of(store) for host, stores in stores_by_host.items() for store in stores if store.rank in ranks[host]
    )

    def order(version: StoreVersion) -> tuple[int, bool, StoreVersion]:
        return counts[version], f"-{world_size}-" in version[1], version

    return max(counts, key=order, default=None)


def _check_store(
    host: str, repository: str, stores: Sequence[HeldStore], ranks: Sequence[int], version: StoreVersion | None
) -> Finding:
    remedy = f"`kimi-mlx launch --hosts ... download {repository}` downloads the missing files"
    if version is None:
        return Finding(host, "stores", "warning", f"no host has a store of `{repository}` yet", remedy)
    name = f"`{repository}` at {version[0]}, {version[1]}"
    missing = sorted(set(ranks) - {store.rank for store in stores if _version_of(store) == version})
    if not missing:
        return Finding(host, "stores", "ok", f"{name}: complete")
    missing_ranks = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing))
    others = sorted({_version_of(store) for store in stores} - {version})
    present = f"; it has {', '.join(f'{commit}, {placement}' for commit, placement in others)}" if others else ""
    return Finding(host, "stores", "problem", f"{name}: the store of {missing_ranks} is missing{present}", remedy)
