"""Facts of two hosts over ssh, and faults."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from kimi_mlx.cluster.doctor.host_checks import check_clock, check_reachable
from kimi_mlx.cluster.hosts.facts import FACTS_LIMIT_S, facts_script, parse_facts
from kimi_mlx.cluster.hosts.ssh import run_everywhere, run_script, ssh_command
from kimi_mlx.cluster.hosts.ssh_errors import explain_ssh
from tests.cluster.hosts import Hosts

pytestmark = pytest.mark.slow


def test_facts_of_two_hosts(hosts: Hosts) -> None:
    script = facts_script([sys.executable])
    answers = run_everywhere(["localhost", *hosts.names], script, FACTS_LIMIT_S)
    for name in hosts.names:
        assert answers[name].stderr == ""
        facts = parse_facts(name, answers[name].stdout)
        assert facts.is_complete
        assert (facts.hostname, facts.system) == (name, "Linux")
        assert facts.home == str(hosts.home(name))
        assert facts.python is not None
        assert facts.python.path == sys.executable
        assert hosts.address(name) in (facts.ip_addr or "")
        assert "thunderbolt0" in (facts.interface_properties or "")
        assert check_clock(facts, answers[name]).state == "ok"


def test_arguments_and_input_arrive_unchanged(hosts: Hosts) -> None:
    arguments = ["", "-x", "it's", "a\nb", '$(id) `id` "$HOME"', "a;b\\", "é *"]
    sent = ssh_command("mac-a", ["printf", "%s\\0", *arguments])
    done = subprocess.run(sent, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=20)
    assert [part.decode() for part in done.stdout.split(b"\0")[:-1]] == arguments
    data = bytes(range(256)) * 4000
    answer = run_script("mac-a", "cat >~/x; cksum <~/x", 20, stdin_extra=data)
    assert answer.is_ok
    assert (hosts.home("mac-a") / "x").read_bytes() == data


@pytest.mark.sweep  # every run of all tests has both with `launch`
@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("stop_sshd", "refuses connections", "sudo systemsetup -setremotelogin on"),
        ("change_host_key", "a different host key", "ssh-keygen -R"),
    ],
)
def test_message_for_each_fault(hosts: Hosts, fault: str, message: str, hint: str) -> None:
    getattr(hosts, fault)("mac-b")
    begin = time.monotonic()
    answers = run_everywhere(hosts.names, "hostname", 30)
    assert time.monotonic() - begin < 20
    assert answers["mac-a"].stdout == "mac-a\n"
    finding = check_reachable(answers["mac-b"])
    assert finding.state == "problem"
    assert message in finding.message
    assert hint in (finding.remedy or "")
    hosts.heal()
    assert run_script("mac-b", "hostname", 20).stdout == "mac-b\n"


@pytest.mark.sweep
def test_pulled_cable_and_host_that_is_off(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_OPTIONS", "-oConnectTimeout=3")
    hosts.cut("mac-a", "lan")
    hosts.power_off("mac-b")
    begin = time.monotonic()
    answers = run_everywhere(hosts.names, "hostname", 30)
    assert time.monotonic() - begin < 20
    for name in hosts.names:
        assert f"`{name}` cannot be reached" in check_reachable(answers[name]).message
    hosts.heal()
    assert [each.stdout for each in run_everywhere(hosts.names, "hostname", 20).values()] == ["mac-a\n", "mac-b\n"]


def test_unknown_host_and_unknown_key(hosts: Hosts) -> None:
    known = hosts.folder / "known_hosts"
    lines = known.read_text().splitlines(keepends=True)
    known.write_text(lines[0])
    assert "not known to ssh yet" in explain_ssh(run_script("mac-b", "true", 20)).message
    authorized = hosts.home("mac-a") / ".ssh/authorized_keys"
    kept = authorized.read_text()
    authorized.write_text("")
    try:
        assert "refuses the login" in explain_ssh(run_script("mac-a", "true", 20)).message
    finally:
        authorized.write_text(kept)


def test_ssh_exits_when_its_host_disappears(hosts: Hosts) -> None:
    command = ssh_command("mac-a", ["sh", "-c", "echo begun; exec sleep 100"], alive_interval_s=1)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        hosts.cut("mac-a")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 255
    assert b"not responding" in errors
