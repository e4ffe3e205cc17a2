"""`kimi-mlx launch` on two hosts over ssh, also when ranks, cables, hosts or the front are lost."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kimi_mlx.cluster.doctor import doctor
from kimi_mlx.cluster.doctor.payloads import Payload, all_payloads
from kimi_mlx.cluster.hosts.hostfile import read_hostfile
from kimi_mlx.cluster.ring.ring import Ring
from kimi_mlx.version import __version__
from tests.cluster import faults, short_waits
from tests.cluster.faults import (
    Fault,
    Front,
    Outcome,
    answer,
    cable_out,
    run_without_faults,
    signalled,
    wait_until_gone,
)
from tests.cluster.hosts import ROOT, Hosts
from tests.cluster.short_waits import shorten_waits
from tests.command import call
from tests.download.host import make_small
from tests.hub import Hub
from tests.server import raw

pytestmark = pytest.mark.slow

HOSTS = ("--hosts", "mac-a,mac-b")
RANK, GUARD = "from kimi_mlx.rank.main import main", "cluster.ring.guard"
DELAY_S = 10.0
"""Extra time for every limit, because the machine may be busy."""

Where = tuple[str, str]


@pytest.fixture(scope="module")
def expected() -> str:
    """Return the answer of one process."""
    return run_without_faults()


@pytest.fixture
def where(hosts: Hosts, tmp_path: Path) -> Where:
    """Options that name the hosts by a hostfile."""
    return "--hostfile", faults.write_hostfile(hosts, tmp_path / "two.json")


@pytest.fixture(autouse=True)
def nothing_is_left(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check after each test that the hosts and the front's temporary folder are clean."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_STATE_HOME", str(hosts.folder / "front/state"))
    yield
    assert wait_until_gone(hosts, DELAY_S) == []
    folder = hosts.folder / "front/tmp"
    left = [path.name for path in folder.glob("*")]
    shutil.rmtree(folder, ignore_errors=True)
    assert left == []


def run(*arguments: str) -> tuple[int, str, str]:
    """Run `launch` in this process with short limits; return exit code, stdout, and stderr as one line."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_waits(patch.setattr)
        done = call("launch", *arguments)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, " ".join(done.stderr.split())


def small_payloads(*sizes: Any) -> list[Payload]:
    """Return the small payloads, for a short self-test."""
    return [each for each in all_payloads(*sizes) if each.size_bytes < 100_000]


def check_answer(outcome: Outcome, expected: str) -> None:
    """Check that stdout is as without faults and no leftovers remain."""
    assert outcome.code == 0, outcome.errors
    assert outcome.text == expected
    assert outcome.left == []
    assert outcome.gone_s < DELAY_S
    assert outcome.errors.count(faults.RECONNECTING) == outcome.errors.count(faults.CONTINUES)


def check_noticed(outcome: Outcome, number: int, noticed_s: float, next_text_s: float, reason: str) -> None:
    """Check that a fault was reported in time with its reason, and that the answer continued in time."""
    effect = outcome.effects[number]
    assert effect.noticed_s is not None
    assert effect.noticed_s < noticed_s + DELAY_S
    assert effect.next_text_s is not None
    assert effect.next_text_s < next_text_s + 2 * DELAY_S
    notes = re.findall(
        r"\n(rank .*?|the ring .*?)\s+reconnecting in \d+ s, attempt \d of \d\n", outcome.errors, re.DOTALL
    )
    assert re.search(reason, " ".join(notes[number].split())), notes


def test_hostfile_is_saved_and_the_answer_survives_kill_stop_and_a_short_cut(
    hosts: Hosts, expected: str, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.json"
    limit_s = 6
    inflicted = [
        signalled(signal.SIGKILL, "mac-a", "--limit", str(limit_s)),
        signalled(signal.SIGSTOP, "mac-b"),
        cable_out("tb", "mac-b", 2),
    ]
    outcome = answer(hosts, [*HOSTS, "--save", str(saved)], inflicted, program=short_waits.TRUSTING_MAIN)
    check_answer(outcome, expected)
    assert f"written: {saved}" in outcome.errors
    assert "2 ranks on mac-a, mac-b over Thunderbolt" in outcome.errors
    assert "283 tokens in " in outcome.errors
    assert [(host.ssh, host.ips) for host in read_hostfile(saved).hosts] == [
        (name, (hosts.address(name),)) for name in hosts.names
    ]
    check_noticed(outcome, 0, 1, 5, r"^rank 0 of 2 \(`mac-a`, process \d+\) was ended by SIGKILL")
    check_noticed(
        outcome,
        1,
        limit_s,
        limit_s + 5,
        r"^rank 1 of 2 \(`mac-b`, process \d+\) has not responded for \d+ s \(limit 6 s\)",
    )
    assert outcome.effects[2].noticed_s is None


@pytest.mark.sweep
def test_answer_survives_cable_and_kill_then_fails_when_a_host_is_off(
    hosts: Hosts, expected: str, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_OPTIONS", "-oConnectTimeout=3")
    options = ("--restarts", "1", "--limit", "3")
    inflicted = [
        cable_out("tb", "mac-b", None, *options),
        signalled(signal.SIGKILL, "mac-b"),
        faults.power_off("mac-b"),
    ]
    outcome = answer(hosts, where, inflicted, program=short_waits.MAIN)
    check_noticed(
        outcome, 0, 3, 10, r"has received nothing from rank \d for \d s: the link between them is dead|no progress in"
    )
    check_noticed(outcome, 1, 1, 5, r"^rank 1 of 2 \(`mac-b`, process \d+\) was ended by SIGKILL")
    assert outcome.effects[2].noticed_s is not None
    assert outcome.effects[2].noticed_s < 3 + DELAY_S
    assert outcome.end_s < 30 + DELAY_S
    assert outcome.code == 1
    assert expected.startswith(outcome.text.rstrip("\n"))
    assert len(outcome.text) >= 3 * faults.MIDDLE
    assert "error: `mac-b` cannot be reached" in outcome.errors
    assert "hint: check that it is on, awake and on this network: `ping mac-b`" in outcome.errors
    assert outcome.left == []


def test_server_survives_a_killed_rank(hosts: Hosts, where: Where) -> None:
    asked = {"messages": [{"role": "user", "content": "Draw a pelican"}], "temperature": 0}
    front = Front(hosts, *where, "serve", "kimi-mini", "--port", "0", code=short_waits.TRUSTING_MAIN)
    front.wait_for_message("try:")
    port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", front.errors)[0])
    whole = raw.chat(port, **asked, max_tokens=None)
    assert whole.status == 200
    expected = json.loads(whole.body)["choices"][0]["message"]["content"]
    with closing(raw.begin(port, **asked, stream=True)) as connection, connection.makefile("rb") as lines:
        pieces: list[str] = []
        for line in lines:
            if line.startswith(b"data: {"):
                pieces += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
                if len(pieces) == 40:
                    faults.send(hosts, "mac-b", signal.SIGKILL, faults.rank_pid(hosts, "mac-b"))
            elif line.startswith(b"data: [DONE]"):
                break
    assert "".join(pieces) == expected
    assert "the ring is up again after" in front.errors
    assert "killed:" not in front.errors  # only what we kill is reported so
    assert json.loads(raw.request(port, path="/health").body)["restarts"] == 1
    front.process.send_signal(signal.SIGINT)
    assert front.end() == 130
    assert "Traceback" not in front.errors
    assert wait_until_gone(hosts, DELAY_S) == []


def running(hosts: Hosts, name: str, mark: str, but: str = "\0") -> bool:
    return any(mark in line and but not in line for line in hosts.left(name))


PHASES: dict[str, Callable[[Front], None]] = {
    "asks the hosts": lambda front: front.wait(lambda: any(map(front.hosts.left, front.hosts.names))),
    "starts the ranks": lambda front: front.wait(lambda: running(front.hosts, "mac-b", GUARD)),
    "joins the ranks": lambda front: front.wait(lambda: running(front.hosts, "mac-b", RANK, GUARD)),
    "answers": lambda front: front.wait_for_text(faults.MIDDLE),
}
"""Phase -> function that waits until the front has reached it."""

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def ways(*chosen: tuple[str, signal.Signals]) -> list[Any]:
    """Return every phase and signal; those not chosen run only with the marker `sweep`."""
    return [
        pytest.param(phase, number, marks=() if (phase, number) in chosen else pytest.mark.sweep)
        for phase in PHASES
        for number in CODES
    ]


@pytest.mark.parametrize(
    ("phase", "number"),
    ways(("asks the hosts", signal.SIGTERM), ("joins the ranks", signal.SIGKILL), ("answers", signal.SIGINT)),
)
def test_nothing_outlives_the_front(hosts: Hosts, where: Where, phase: str, number: signal.Signals) -> None:
    front = Front(hosts, *where, *faults.QUESTION)
    PHASES[phase](front)
    front.process.send_signal(number)
    begin = time.monotonic()
    assert front.end() == CODES[number], front.errors
    assert time.monotonic() - begin < DELAY_S
    assert wait_until_gone(hosts, DELAY_S) == []
    assert "Traceback" not in front.errors
    assert "error" not in front.errors
    if number == signal.SIGKILL:  # a killed front cannot remove it
        shutil.rmtree(hosts.folder / "front/tmp")


@pytest.mark.sweep
def test_rank_exits_when_the_front_is_killed_and_the_network_is_cut(hosts: Hosts, where: Where) -> None:
    silence_s = 6.0
    code = f"from kimi_mlx.cluster.ring import ring; ring.FRONT_SILENCE_S = {silence_s}\n{short_waits.MAIN}"
    front = Front(hosts, *where, *faults.QUESTION, code=code)
    front.wait_for_text(faults.MIDDLE)
    begin = time.monotonic()
    faults.front_killed_while_cut_off("mac-b").inflict(front)
    front.end()
    end = time.monotonic() + DELAY_S
    while hosts.left("mac-a"):
        assert time.monotonic() < end
    assert hosts.left("mac-b")  # it cannot know yet
    assert wait_until_gone(hosts, silence_s + DELAY_S) == []
    assert time.monotonic() - begin < silence_s + DELAY_S
    shutil.rmtree(hosts.folder / "front/tmp")


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("stop_sshd", "`mac-b` refuses connections", "sudo systemsetup -setremotelogin on"),
        ("change_host_key", "`mac-b` has a different host key", "ssh-keygen -R"),
        ("power_off", "`mac-b` cannot be reached", "check that it is on, awake"),
    ],
)
def test_host_unreachable_by_ssh(
    hosts: Hosts, fault: str, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_OPTIONS", "-oConnectTimeout=3")
    getattr(hosts, fault)("mac-b")
    begin = time.monotonic()
    code, out, err = run(*HOSTS, "chat", "kimi-mini", "-p", "hi")
    assert time.monotonic() - begin < 5 + DELAY_S
    assert (code, out) == (1, "")
    assert message in err
    assert hint in err


def test_hosts_with_wrong_python_address_or_version(hosts: Hosts, tmp_path: Path) -> None:
    question = ("chat", "kimi-mini", "-p", "hi")
    code, out, err = run(*HOSTS, "--python", "/no/such/python", *question)
    assert (code, out) == (1, "")
    assert err.count("`/no/such/python` does not exist") == 2

    foreign = tmp_path / "foreign.json"
    pair = [{"ssh": "mac-a", "ips": [hosts.address("mac-a")]}, {"ssh": "mac-b", "ips": ["10.99.0.7"]}]
    foreign.write_text(json.dumps(pair))
    code, out, err = run("--hostfile", str(foreign), *question)
    assert (code, out) == (1, "")
    assert f"it has {hosts.address('mac-b', 'lan')}, {hosts.address('mac-b')}" in err

    folder = hosts.packages("mac-b") / "kimi_mlx-0.0.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kimi-mlx\nVersion: 0.0.9\n")
    code, out, err = run(*HOSTS, *question)
    assert (code, out) == (1, "")
    assert f"kimi-mlx 0.0.9 (`mac-a`: {__version__})" in err
    assert "`kimi-mlx launch --hosts mac-a,mac-b --install`" in err


@pytest.mark.sweep
def test_port_is_taken_before_a_rank_listens(hosts: Hosts, where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[str] = []
    join = Ring._join

    def take_port_and_join(ring: Ring, listening: dict[int, Any]) -> None:
        if pids:  # the second start, with other ports
            join(ring, listening)
            return
        [port] = listening[1]["ports"]
        place = f"('{hosts.address('mac-b')}', {port})"
        program = f"import socket, time; s = socket.create_server({place}); time.sleep(60)"
        pids.append(hosts.run("mac-b", "sh", "-c", f'python3 -c "{program}" >/dev/null 2>&1 & echo $!').strip())
        time.sleep(0.5)
        join(ring, listening)

    monkeypatch.setattr(Ring, "_join", take_port_and_join)
    code, out, err = run(*where, "chat", "kimi-mini", "-p", "hi")
    hosts.run("mac-b", "kill", *pids)
    assert (code, bool(out), "error" in err) == (0, True, False)


@pytest.fixture
def hub(hosts: Hosts, tmp_path: Path) -> Iterator[Hub]:
    """Start a hub that the hosts can reach."""
    with Hub(
        {"owner/model": make_small(tmp_path / "model")}, (hosts.address("this"), hosts.address("this", "lan"))
    ) as hub:
        yield hub


def test_download_then_chat_from_the_stores_then_without_one_of_them(hosts: Hosts, where: Where, hub: Hub) -> None:
    envs = ("--env", f"HF_ENDPOINT={hub.url}", "--env", "HF_HUB_DISABLE_XET=1")
    hub.fail("status", "/cdn/*", status=429, times=1, headers={"Retry-After": "5"})
    code, out, err = run(*where, *envs, "download", "owner/model", "--strategy", "pipeline", "--json")
    assert code == 0, err
    assert re.search(r"^mac-[ab]: waiting: .* answered with status 429\.", err, re.MULTILINE), err
    result = json.loads(out)
    assert [each["host"] for each in result["hosts"]] == hosts.names
    size = sum(path.stat().st_size for path in hub.folders["owner/model"].iterdir())
    assert hub.sent_bytes < 1.05 * size
    stores = [hosts.home(name) / ".local/share/kimi-mlx/stores" for name in hosts.names]
    assert [sorted(path.parent.name for path in each.rglob("manifest.json")) for each in stores] == [
        ["rank-0"],
        ["rank-1"],
    ]
    hub.reset_counts()

    options = ("-t", "0", "--no-thinking", "--max-tokens", "5", "--json")
    code, out, err = run(*where, "chat", "owner/model", "-p", "hi", *options)
    assert code == 0, err
    assert json.loads(out)["statistics"]["generated_tokens"] == 5
    assert json.loads(out)["placement"] == {"strategy": "pipeline", "reason": "as it is stored on the hosts"}
    assert hub.requests == []

    shutil.rmtree(stores[1])
    code, out, err = run(*where, "chat", "owner/model", "-p", "hi")
    assert (code, out) == (1, "")
    assert "the store of rank 1 is missing" in err
    assert re.search(r"launch --hostfile \S+ download owner/model", err), err
    code, out, err = run(*where, "--force", "chat", "owner/model", "-p", "hi")
    assert (code, out) == (1, "")
    assert "error: `owner/model` is not on the host of rank 1" in err
    assert "hint: download it to all hosts" in err


@pytest.mark.sweep
def test_check_and_bench_print_one_document(hosts: Hosts, where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "all_payloads", small_payloads)
    code, out, err = run(*where, "check", "kimi-mini", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["hosts"], result["ranks"], result["backend"]) == (hosts.names, 2, "ring")
    assert result["placement"]["strategy"] == "hybrid"  # by the rule: on Linux nothing is predicted
    assert "per message, no prediction for" in result["placement"]["reason"]
    assert result["statistics"]["generated_tokens"] == 32
    sizes = ("--prompt-tokens", "8", "--generation-tokens", "4", "--repeat", "1", "--warmup", "0")
    code, out, err = run(*where, "bench", "kimi-mini", *sizes, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["hosts"], result["ranks"]) == (hosts.names, 2)
    assert [each["prompt_tokens"] for each in result["results"]] == [8]


@pytest.mark.sweep
@pytest.mark.parametrize("repetition", range(2))
@pytest.mark.parametrize("fault", [each for each in faults.FAULTS if not each.ends], ids=lambda each: each.name)
def test_each_fault_by_itself(hosts: Hosts, expected: str, where: Where, fault: Fault, repetition: int) -> None:
    check_answer(answer(hosts, where, [fault]), expected)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "several",
    [
        [signalled(signal.SIGKILL, name) for name in ("mac-a", "mac-b", "mac-a")],
        [signalled(signal.SIGSTOP, "mac-a", "--limit", "3"), faults.guard_killed("mac-a")],
    ],
    ids=["three kills", "stop and guard"],
)
def test_faults_one_after_the_other(hosts: Hosts, expected: str, where: Where, several: Sequence[Fault]) -> None:
    check_answer(answer(hosts, where, several), expected)
