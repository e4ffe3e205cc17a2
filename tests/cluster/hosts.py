"""Simulate hosts with namespaces, for tests over ssh. Needs Linux and root.

Each host is a set of namespaces (network, mounts, processes, name) with its own init process, SSH server, home and
host key; it shares files, processors and memory with this machine. A third network namespace is the switch. It has two
bridges, `lan` (for ssh) and `tb` (the Thunderbolt cable), which connect the hosts and this machine. No namespace has a
name, so that everything, cables included, disappears with the processes that hold it. These processes end with the
test process, even if it is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

LINKS = {"lan": ("en0", 77), "tb": ("thunderbolt0", 78)}
"""Link -> (its interface on a host, the second number of its addresses)."""

ROOT = Path(__file__).parents[2]
"""Source folder; hosts run the kimi-mlx of this folder."""

LIMIT_S = 15.0
"""Time limit of each step."""

TOOLS = ("ip", "tc", "ps", "unshare", "nsenter", "setpriv", "mount", "ssh", "ssh-keygen", "sshd")

START_UP_FILES = {"bash": ".bashrc", "zsh": ".zshenv", "fish": ".config/fish/config.fish", "tcsh": ".cshrc"}
"""Login shell -> file that it reads before every command, relative to the home folder."""

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_PLAIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_FIRST_PROCESS = """
mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && mount -t tmpfs tmpfs /dev/shm &&
mount --bind "$1/passwd" /etc/passwd && mount --bind "$1/etc_hosts" /etc/hosts && hostname "$2" && : >"$1/ready"
while :; do sleep 1000 & wait $!; done
"""


def missing_requirement() -> str | None:
    """Return why this machine cannot run test hosts; None if it can."""
    if sys.platform != "linux":
        return "test hosts need namespaces of Linux"
    if os.geteuid() != 0:
        return "test hosts need root"
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]:
        return f"test hosts need {', '.join(missing)}"
    probe = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork"]
    probe += [
        "sh",
        "-c",
        "mount --make-rprivate / && ip link add x1 type bridge && ip link add x2 type veth peer name x3",
    ]
    done = subprocess.run(probe, capture_output=True, text=True, env={"PATH": _PATH}, timeout=LIMIT_S, check=False)
    return f"cannot create namespaces: {done.stderr.strip()}" if done.returncode else None


class Hosts:
    """Context manager that starts the hosts `mac-a`, `mac-b` ... and removes them on exit.

    Args:
        count: number of hosts.
    """

    def __init__(self, count: int = 2):
        self.names = [f"mac-{letter}" for letter in "abcdefgh"[:count]]
        # Not below pytest's folder, which only its owner may enter: sshd reads keys as another user.
        self.folder = Path(tempfile.mkdtemp(prefix="kimi-hosts-"))
        self._id = f"{os.getpid() % 0xFFFFF:05x}{id(self) >> 4 & 0xFFF:03x}"
        self._subnet = _free_subnet()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._without: set[str] = set()
        self._read_only: list[tuple[str, Path]] = []

    def __enter__(self) -> Hosts:
        """Start the switch, the hosts and their SSH servers."""
        try:
            self._write_files()
            self._start("switch", ["sh", "-c", ': >"$1"; exec sleep infinity', "switch", str(self._ready("switch"))])
            for link, (_, second) in LINKS.items():
                self._in("switch", "ip", "link", "add", link, "type", "bridge")
                self._in("switch", "ip", "link", "set", link, "up")
                self._plug("this", link, os.getpid(), f"k{self._id}{link[0]}", f"10.{second}.{self._subnet}.1/24")
            for name in self.names:
                self._boot(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hosts."""
        self.close()

    def close(self) -> None:
        """Kill all processes, which removes namespaces and cables, and delete the files."""
        for name in [*self.names, "switch"]:
            self._end(name)
        _wait(lambda: not list(Path("/sys/class/net").glob(f"k{self._id}*")), "the end of the cables")
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def path(self) -> str:
        """Return a PATH whose `ssh` knows the hosts; the user's ~/.ssh is not used.

        The variable SSH_OPTIONS adds options, which take precedence over those of kimi-mlx.
        """
        return f"{self.folder}/bin:{_PATH}"

    def address(self, name: str, link: str = "tb") -> str:
        """Return the address of a host on a link; `this` is this machine."""
        last = 1 if name == "this" else 11 + self.names.index(name)
        return f"10.{LINKS[link][1]}.{self._subnet}.{last}"

    def home(self, name: str) -> Path:
        """Return root's home folder on a host; the path is valid on this machine too."""
        return self.folder / name / "home"

    def packages(self, name: str) -> Path:
        """Return the first folder of a host's Python path; it starts empty."""
        return self.folder / name / "packages"

    def left(self, name: str) -> list[str]:
        """Return command lines of our processes on a host, and names of its temporary files."""
        if self._processes[name].poll() is not None:
            return []
        lines = self._in(name, "ps", "-A", "-o", "args=").splitlines()
        marks = ("kimi_mlx", "--limit")  # ranks and their guards, measurements
        return [
            *(line for line in lines if any(mark in line for mark in marks)),
            *os.listdir(self.folder / name / "tmp"),
        ]

    def is_connected(self, name: str) -> bool:
        """Return whether a host has a TCP connection over Thunderbolt."""
        number = "".join(f"{int(each):02X}" for each in reversed(self.address(name).split(".")))
        rows = [line.split() for line in self._in(name, "cat", "/proc/net/tcp").splitlines()]
        return any(row[1].startswith(number) and row[3] == "01" for row in rows)

    def slow_down(self, name: str, link: str, rate: str) -> None:
        """Limit the rate at which a host sends, e.g. `50mbit`."""
        self._in(name, "tc", *f"qdisc add dev {LINKS[link][0]} root tbf rate {rate} burst 64kb latency 100ms".split())

    def drop_answers(self, name: str) -> None:
        """Act as a firewall: drop answers from ports above 1023 of this host over Thunderbolt."""
        rule = f"rule add pref 100 to 10.78.{self._subnet}.0/24 ipproto tcp sport 1024-65534 blackhole"
        self._in(name, "ip", *rule.split())

    def run(self, name: str, *command: str) -> str:
        """Run a command on a host without ssh; return its standard output."""
        return self._in(name, *command)

    def cut(self, name: str, *links: str) -> None:
        """Pull cables out (all, if none is named): packets are lost, addresses stay."""
        for link in links or LINKS:
            self._in("switch", "ip", "link", "set", f"{link}-{name}", "down")

    def plug_in(self, name: str, *links: str) -> None:
        """Undo `cut`."""
        for link in links or LINKS:
            self._in("switch", "ip", "link", "set", f"{link}-{name}", "up")

    def boot(self, name: str, *, keeps_temporary_files: bool = False) -> None:
        """Switch a host on again, with its files."""
        if not keeps_temporary_files:
            temporary = self.folder / name / "tmp"
            shutil.rmtree(temporary)
            temporary.mkdir()
        self._boot(name)

    def stop_sshd(self, name: str) -> None:
        """Stop the SSH server; open sessions continue."""
        pid = (self.folder / name / "sshd.pid").read_text().strip()
        self._in(name, "sh", "-c", f"kill {pid}")
        _wait(lambda: not self._listens(name), f"the end of sshd on {name}")

    def change_host_key(self, name: str) -> None:
        """Replace the host key, as a new installation does."""
        self.stop_sshd(name)
        _make_key(self.folder / name / "host_key", name)
        self._start_sshd(name)

    def remove_kimi_mlx(self, name: str) -> None:
        """Remove kimi-mlx from the path of a host's Python, as if it was never installed."""
        self._without.add(name)
        self._write_sshd_config(name)
        self.stop_sshd(name)
        self._start_sshd(name)

    def set_login_shell(self, name: str, shell: str, start_up: str) -> None:
        """Give root on a host another login shell.

        Args:
            name: host.
            shell: path of the shell.
            start_up: content of the start-up file that it reads for every command.
        """
        self._write_passwd(name, shell)
        file = self.home(name) / START_UP_FILES[Path(shell).name]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(start_up)

    def make_read_only(self, name: str, folder: Path) -> None:
        """Make a folder read-only on a host, until it is restored."""
        self._in(name, "mount", "--rbind", str(folder), str(folder))
        self._read_only.append((name, folder))
        self._in(name, "mount", "-o", "remount,ro,bind", str(folder))

    def fill_temporary_folder(self, name: str) -> None:
        """Leave no space in the folder of TMPDIR on a host, until it is restored."""
        folder = self.folder / name / "tmp"
        self._in(name, "mount", "-t", "tmpfs", "-o", "size=4k", "none", str(folder))
        self._read_only.append((name, folder))
        self._in(name, "sh", "-c", f"dd if=/dev/zero of={folder}/full bs=4k count=1 2>/dev/null")

    def power_off(self, name: str) -> None:
        """Switch a host off without a message to its peers."""
        self.cut(name)
        self._end(name)

    def heal(self) -> None:
        """Restore all hosts."""
        while self._read_only:
            name, folder = self._read_only.pop()
            with contextlib.suppress(subprocess.CalledProcessError):
                self._in(name, "umount", "--lazy", str(folder))
        for name in self.names:
            self._write_passwd(name, "/bin/bash")
            for file in START_UP_FILES.values():
                (self.home(name) / file).unlink(missing_ok=True)
            if self._processes[name].poll() is not None:
                self.boot(name)
                continue
            self.plug_in(name)
            for interface, _ in LINKS.values():
                with contextlib.suppress(subprocess.CalledProcessError):
                    self._in(name, "tc", "qdisc", "del", "dev", interface, "root")
            with contextlib.suppress(subprocess.CalledProcessError):
                self._in(name, "ip", "rule", "del", "pref", "100")
            for folder in (self.packages(name), self.home(name) / ".local"):
                shutil.rmtree(folder, ignore_errors=True)
            self.packages(name).mkdir()
            if name in self._without:
                self._without.remove(name)
                self._write_sshd_config(name)
                if self._listens(name):
                    self.stop_sshd(name)
            if not self._listens(name):
                self._start_sshd(name)
        self._write_known_hosts()

    def _ready(self, name: str) -> Path:
        return self.folder / name / "ready"

    def _boot(self, name: str) -> None:
        command = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._start(name, [*command, "bash", "-c", _FIRST_PROCESS, "init", str(self.folder / name), name])
        pid = self._processes[name].pid
        _run("nsenter", "-t", str(pid), "-n", "ip", "link", "set", "lo", "up")
        for link, (interface, _) in LINKS.items():
            self._plug(name, link, pid, interface, f"{self.address(name, link)}/24")
        self._start_sshd(name)

    def _start(self, name: str, command: Sequence[str]) -> None:
        """Start the process that holds a network namespace; it ends with this process."""
        ready = self._ready(name)
        ready.unlink(missing_ok=True)
        with (self.folder / name / "log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": _PLAIN, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        _wait(ready.exists, f"{name}; see {self.folder / name / 'log'}")

    def _end(self, name: str) -> None:
        process = self._processes.get(name)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait(LIMIT_S)

    def _plug(self, name: str, link: str, pid: int, interface: str, address: str) -> None:
        """Connect a network namespace to the switch."""
        port = f"{link}-{name}"
        switch = str(self._processes["switch"].pid)
        inside = ("nsenter", "-t", str(pid), "-n", "ip")
        with contextlib.suppress(subprocess.CalledProcessError):
            self._in("switch", "ip", "link", "del", port)  # left by a host that was switched off
        numbers = [int(each) for each in address.partition("/")[0].split(".")]
        mac = "02:4b:" + ":".join(f"{each:02x}" for each in numbers)  # kept over a restart, because peers cache it
        new_link = ("link", "add", interface, "address", mac, "netns", str(pid))
        _run("ip", *new_link, "type", "veth", "peer", "name", port, "netns", switch)
        _run(*inside, "addr", "add", address, "dev", interface)
        _run(*inside, "link", "set", interface, "up")
        self._in("switch", "ip", "link", "set", port, "master", link, "up")

    def _in(self, name: str, *command: str) -> str:
        """Run a command in the namespaces of the switch or a host."""
        pid = self._processes[name].pid
        if name == "switch":
            return _run("nsenter", "-t", str(pid), "-n", *command)
        first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        environment = ["env", "-i", f"PATH={_PLAIN}", f"HOME={self.home(name)}", f"TMPDIR={self.folder / name / 'tmp'}"]
        return _run("nsenter", "-t", first, "-m", "-u", "-i", "-n", "-p", *environment, *command)

    def _listens(self, name: str) -> bool:
        return ":0016 00000000:0000 0A" in self._in(name, "cat", "/proc/net/tcp")

    def _start_sshd(self, name: str) -> None:
        self._in(name, "/usr/sbin/sshd", "-f", f"{self.folder}/{name}/sshd_config", "-E", f"{self.folder}/{name}/log")
        _wait(lambda: self._listens(name), f"sshd on {name}; see {self.folder / name / 'log'}")

    def _write_files(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "switch").mkdir()
        _make_key(self.folder / "id", "tests")
        public = (self.folder / "id.pub").read_text()
        lines = [
            f"Host {name} {self.address(name, 'lan')} {self.address(name)}\n  HostName {self.address(name, 'lan')}"
            for name in self.names
        ]
        lines += [
            f"Host mac-? 10.77.{self._subnet}.* 10.78.{self._subnet}.*",
            f"  User root\n  IdentityFile {self.folder}/id\n  IdentitiesOnly yes\n  IdentityAgent none",
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null",
            "  StrictHostKeyChecking yes\n  UpdateHostKeys no",
        ]
        (self.folder / "ssh_config").write_text("\n".join(lines) + "\n")
        (self.folder / "bin").mkdir()
        shim = self.folder / "bin" / "ssh"
        shim.write_text(
            f'#!/bin/sh\nexec {shutil.which("ssh", path=_PATH)} -F {self.folder}/ssh_config $SSH_OPTIONS "$@"\n'
        )
        shim.chmod(0o755)
        names = [f"{self.address(name, 'lan')} {name} {name}.local" for name in self.names]
        for name in self.names:
            self._write_host(name, public, names)
        self._write_known_hosts()

    def _write_host(self, name: str, public: str, names: Sequence[str]) -> None:
        place = self.folder / name
        for each in (place / "home" / ".ssh", place / "tmp", place / "packages"):
            each.mkdir(parents=True)
        (place / "home" / ".ssh").chmod(0o700)
        (place / "home" / ".ssh" / "config").write_text(f"Include {self.folder}/ssh_config\n")
        (place / "home" / ".ssh" / "authorized_keys").write_text(public)
        (place / "etc_hosts").write_text("127.0.0.1 localhost\n" + "\n".join(names) + "\n")
        self._write_passwd(name, "/bin/bash")
        _make_key(place / "host_key", name)
        self._write_sshd_config(name)

    def _write_passwd(self, name: str, shell: str) -> None:
        users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        roots = [[*user[:5], str(self.home(name)), shell] if user[0] == "root" else user for user in users]
        (self.folder / name / "passwd").write_text("".join(":".join(user) + "\n" for user in roots))

    def _write_sshd_config(self, name: str) -> None:
        place = self.folder / name
        python_path = "" if name in self._without else f"PYTHONPATH={place}/packages:{ROOT}"
        (place / "sshd_config").write_text(
            f"Port 22\nListenAddress 0.0.0.0\nHostKey {place}/host_key\nPidFile {place}/sshd.pid\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "UsePAM no\nStrictModes no\nUseDNS no\nPrintMotd no\nPrintLastLog no\nMaxStartups 100\nMaxSessions 100\n"
            f"SetEnv PATH=/usr/bin:/bin:/usr/sbin:/sbin TMPDIR={place}/tmp {python_path}\n"
        )

    def _write_known_hosts(self) -> None:
        keys = {name: (self.folder / name / "host_key.pub").read_text() for name in self.names}
        lines = [f"{name},{self.address(name, 'lan')},{self.address(name)} {key}" for name, key in keys.items()]
        (self.folder / "known_hosts").write_text("".join(lines))


def _free_subnet() -> int:
    """Return a number n such that no route uses 10.77.n.0/24 or 10.78.n.0/24."""
    routes = _run("ip", "-4", "route", "show", "table", "all")
    start = os.getpid() % 254
    numbers = ((start + i) % 254 + 1 for i in range(254))
    return next(n for n in numbers if all(f"10.{second}.{n}." not in routes for _, second in LINKS.values()))


def _make_key(path: Path, comment: str) -> None:
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".pub").unlink(missing_ok=True)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path))


def _run(*command: str) -> str:
    environment = {"PATH": _PATH}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def _wait(is_done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {LIMIT_S:.0f} s for {what}")
        time.sleep(0.02)
