"""A user's systemd on a machine that was not booted with it: in a mount namespace and control groups of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = Path("/usr/lib/systemd/systemd")
PATIENCE_S = 20.0
# systemd asks whether /run/systemd/system exists. $1: folder of its control groups
SCRIPT = """
for tree in /sys/fs/cgroup /sys/fs/cgroup/*; do
  [ -e "$tree/cgroup.procs" ] && mkdir "$tree/$1" 2>/dev/null && echo $$ > "$tree/$1/cgroup.procs"
done
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && exec /usr/lib/systemd/systemd --user
"""


def why_not() -> str | None:
    """Return why a user's systemd cannot run here; None if it can."""
    if not PROGRAM.exists() or shutil.which("systemctl") is None:
        return "no systemd"
    if os.getuid() != 0 or shutil.which("unshare") is None:
        return "needs root and unshare"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "mount namespaces are not allowed"
    return None


@contextlib.contextmanager
def user_systemd(folder: Path) -> Iterator[dict[str, str]]:
    """Run a user's systemd; yields the environment variables that its clients need.

    Args:
        folder: folder for its sockets, its units and the user's home. Its path must be short.
    """
    runtime, home = folder / "run", folder / "home"
    runtime.mkdir(mode=0o700)
    home.mkdir()
    variables = {
        "XDG_RUNTIME_DIR": str(runtime),
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),  # the tests' own is another: units would not be found there
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_STATE_HOME": str(home / "state"),
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/none",
    }
    group = f"kimi-mlx-test-{os.getpid()}"
    with (folder / "systemd.log").open("wb") as log:
        command = ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", group]
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
    try:
        _wait_until_up({**os.environ, **variables}, process, folder / "systemd.log")
        yield variables
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _remove_groups(group)


def _wait_until_up(environment: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    command = ["systemctl", "--user", "show", "--property=Version"]
    while subprocess.run(command, env=environment, capture_output=True).returncode:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _remove_groups(name: str) -> None:
    """Kill what is left in the control groups, and remove them."""
    for top in [Path("/sys/fs/cgroup") / name, *Path("/sys/fs/cgroup").glob(f"*/{name}")]:
        folders = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
        for folder in [*folders, top]:
            with contextlib.suppress(OSError):
                for pid in (folder / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            deadline = time.monotonic() + 2
            while folder.exists() and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                time.sleep(0.02)
