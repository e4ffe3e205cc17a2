"""What is wrong with this machine or with a cluster: facts, checks, links, self-test. Never imports MLX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kimi_mlx.cluster.doctor.findings import Finding, has_trouble
from kimi_mlx.cluster.doctor.payloads import all_payloads
from kimi_mlx.cluster.doctor.run_checks import (
    Question,
    calm,
    check_hosts,
    check_need,
    check_together,
    read_answers,
    with_hosts,
)
from kimi_mlx.cluster.doctor.self_test import SelfTest, self_test
from kimi_mlx.cluster.hosts.facts import FACTS_LIMIT_S, Facts, facts_script, own_interpreter
from kimi_mlx.cluster.hosts.host import Backend, Cluster, Hostfile
from kimi_mlx.cluster.hosts.ssh import is_local, run_everywhere
from kimi_mlx.cluster.install.install import prefer
from kimi_mlx.cluster.network.choose import Say, join_hosts
from kimi_mlx.cluster.network.links import Network
from kimi_mlx.cluster.network.survey import Link, measure_network
from kimi_mlx.cluster.network.topology import pick_backend, topology

DEAD_LINK_LIMIT_S = 3.0
"""For finding the link that a self-test has hung on."""

BLOCKING = frozenset(
    {"reachable", "python", "versions", "host", "addresses", "devices", "cables", "RDMA", "bridge", "link"}
)
"""Checks whose trouble makes a self-test pointless."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Args:
        hosts: their names, each once.
        facts: of those that answered.
        findings: all checks.
        links: the networks that were measured.
        network: the chosen one; None if there is none, or no need of one.
        backend: how the ranks would talk.
        hostfile: to start with, if a network was chosen or given.
        self_test: None if it was not run.
    """

    hosts: tuple[str, ...]
    facts: Mapping[str, Facts]
    findings: tuple[Finding, ...]
    links: tuple[Link, ...] = ()
    network: Network | None = None
    backend: Backend = "ring"
    hostfile: Hostfile | None = None
    self_test: SelfTest | None = None

    @property
    def has_trouble(self) -> bool:
        """Whether anything stands in the way."""
        return has_trouble(self.findings)

    @property
    def pythons(self) -> dict[str, str]:
        """Host -> the interpreter to use, of those that have one."""
        return {host: facts.python.path for host, facts in self.facts.items() if facts.python is not None}

    @property
    def cluster(self) -> Cluster | None:
        """Where ranks can be started; None if hosts cannot be reached, lack Python, or do not reach each other."""
        is_whole = self.hostfile is not None and self.pythons.keys() >= set(self.hosts)
        return Cluster(self.hostfile, self.backend, self.pythons) if self.hostfile and is_whole else None


def examine(question: Question, own_python: str, say: Say = lambda text: None) -> Diagnosis:
    """Ask, check, measure, test.

    Args:
        question: what to examine.
        own_python: this machine's interpreter, which is looked for on the hosts, too.
        say: told what is being done.

    Raises:
        UsageError: a host's name that ssh cannot be given.
    """
    diagnosis = _examine(question, own_python, say)
    return replace(diagnosis, findings=tuple(with_hosts(diagnosis.findings, question.names)))


def with_need(diagnosis: Diagnosis, question: Question) -> Diagnosis:
    """The diagnosis for what a model needs with the placement that was chosen, after examine with the same hosts."""
    findings = check_need(question, diagnosis.facts, diagnosis.findings)
    return replace(diagnosis, findings=tuple(with_hosts(findings, question.names)))


def _examine(question: Question, own_python: str, say: Say) -> Diagnosis:
    known, front, findings = _ask(question, own_python, say)
    joined = topology([*known.values()])
    asked = question.backend or question.hostfile.backend
    backend = pick_backend(asked, [*known.values()], joined)
    findings += check_together(question, known, front, joined, backend)
    diagnosis = Diagnosis(tuple(question.names), known, tuple(findings), backend=backend)
    if len(known) < len(question.names) or any(facts.python is None for facts in known.values()):
        return _without_test(question, diagnosis)
    if len(question.names) == 1:
        diagnosis = replace(diagnosis, hostfile=question.hostfile)
    elif not _is_blocked(diagnosis):  # addresses that are not there need no measurement
        result = join_hosts(question, diagnosis.pythons, joined, backend, say)
        diagnosis = replace(
            diagnosis,
            findings=(*diagnosis.findings, *result.findings),
            links=result.links,
            network=result.network,
            hostfile=result.hostfile,
        )
    return _test(question, diagnosis, say)


def _ask(question: Question, own_python: str, say: Say) -> tuple[dict[str, Facts], Facts | None, list[Finding]]:
    """One trip to all hosts: facts, those of this machine if it is none of them, and the checks of each."""
    names = question.names
    say("asking this machine" if question.is_alone else f"asking {', '.join(names)}")
    envs = question.hostfile.envs
    script = facts_script([question.python or own_python], envs=envs, is_search=question.python is None)
    front_name = None if any(map(is_local, names)) else "localhost"
    answers = run_everywhere([*names, *([front_name] if front_name else [])], script, FACTS_LIMIT_S)
    known, reachable = read_answers(answers)
    known = {host: prefer(facts, own_interpreter()) for host, facts in known.items()}
    front = known.pop(front_name, None) if front_name else None
    reachable = [each for each in reachable if each.host != front_name and not question.is_alone]
    return known, front, [*reachable, *check_hosts(question, known, answers)]


def _test(question: Question, diagnosis: Diagnosis, say: Say) -> Diagnosis:
    """The self-test, if it is wanted and nothing makes it pointless."""
    hostfile, need = diagnosis.hostfile, question.need
    if question.is_quick or hostfile is None or _is_blocked(diagnosis):
        return _without_test(question, diagnosis)
    rates = [
        link.measured.bytes_per_s for link in diagnosis.links if link.measured and link.network == diagnosis.network
    ]
    rate = min(rates) if rates and diagnosis.backend == "ring" else None
    payloads = all_payloads(need.hidden_size, need.vocab_size, question.world_size, need.prefill_chunk, rate)
    slowest_s = 4 * question.world_size * max(payload.size_bytes for payload in payloads) / (rate or 1e9)
    over = "" if question.world_size == 1 else f" of {question.world_size} ranks over {diagnosis.backend}"
    say(f"self-test{over}")
    cluster = Cluster(hostfile, diagnosis.backend, diagnosis.pythons)
    result = self_test(cluster, payloads, need.hidden_size, slowest_s)
    if result.is_stalled and diagnosis.network is not None:
        say("looking for the dead link")
        result = _with_dead_links(result, diagnosis, [host.ssh for host in hostfile.hosts])
    findings = [*diagnosis.findings, *result.findings]
    return replace(
        diagnosis,
        self_test=result,
        findings=tuple(findings if has_trouble(result.findings) else calm(findings)),
    )


def _with_dead_links(result: SelfTest, diagnosis: Diagnosis, hosts: Sequence[str]) -> SelfTest:
    assert diagnosis.network is not None
    link = measure_network(hosts, diagnosis.network, diagnosis.pythons, DEAD_LINK_LIMIT_S)
    found = "; ".join(link.problems) or "all links answer now; the fault has gone, or is in MLX"
    message = f"{result.findings[0].message}\n  {found}"
    return replace(result, findings=(replace(result.findings[0], message=message), *result.findings[1:]))


def _without_test(question: Question, diagnosis: Diagnosis) -> Diagnosis:
    """Say that there was no self-test, unless none was wanted."""
    if question.is_quick:
        return diagnosis
    finding = Finding(
        ", ".join(diagnosis.hosts),
        "self-test",
        "warning",
        "not run, because of the trouble above",
        "mend that first, then run the doctor again",
    )
    return replace(diagnosis, findings=(*diagnosis.findings, finding))


def _is_blocked(diagnosis: Diagnosis) -> bool:
    return any(finding.state == "trouble" and finding.check in BLOCKING for finding in diagnosis.findings)
