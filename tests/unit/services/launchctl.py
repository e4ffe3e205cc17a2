"""A small `launchctl` for tests: it keeps loaded agents in the folder $FAKE_LAUNCHD, and starts their programs.

The output of `print` has the format of macOS 15.
"""

import os
import signal
import sys
import time
from pathlib import Path

LOADED = Path(os.environ["FAKE_LAUNCHD"])


def launch(agent: dict) -> int:
    import subprocess

    with open(agent["StandardOutPath"], "ab") as log:
        process = subprocess.Popen(
            agent["ProgramArguments"],
            env=agent["EnvironmentVariables"],
            cwd=agent["WorkingDirectory"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return process.pid


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def show(label: str) -> int:
    file = LOADED / label
    if not file.exists():
        print(f'Could not find service "{label}" in domain for user gui: 501', file=sys.stderr)
        return 113
    pid = int(file.read_text())
    state = f"running\n\tpid = {pid}" if is_alive(pid) else "not running"
    print(f"gui/501/{label} = {{\n\tactive count = 1\n\tstate = {state}\n\targuments = {{\n\t\tpid = 5\n\t}}")
    print("\truns = 1\n\tlast exit code = (never exited)\n}")
    return 0


def main(command: str, target: str, path: str = "") -> int:
    label = target.split("/")[2] if target.count("/") > 1 else ""
    if command == "print":
        return show(label) if label else 0
    if command == "bootstrap":
        import plistlib  # here: `print` is quick

        agent = plistlib.loads(Path(path).read_bytes())
        if (LOADED / agent["Label"]).exists():
            print("Bootstrap failed: 5: Input/output error", file=sys.stderr)
            return 5
        (LOADED / agent["Label"]).write_text(str(launch(agent)))
    if command == "bootout":
        pid = int((LOADED / label).read_text())
        if is_alive(pid):
            os.kill(pid, signal.SIGTERM)
        while is_alive(pid):
            time.sleep(0.02)
        (LOADED / label).unlink()
    return 0


sys.exit(main(*sys.argv[1:]))
