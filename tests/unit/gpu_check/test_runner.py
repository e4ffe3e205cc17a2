"""Processes of the checks: results, time limits, errors, and an end with the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from kimi_mlx.errors import UsageError
from kimi_mlx.gpu_check.checks import Check, CheckResult, Comparison
from kimi_mlx.gpu_check.runner import describe, run_check, run_checks
from kimi_mlx.model.device import has_gpu

MODULES = {
    "passes": "def check(context):\n    context.report('a', 0.1, 0.2)\n    context.measure('step', '1 k', 3, 'ms')\n",
    "fails": "def check(context):\n    context.report('a', 0.3, 0.2)\n    context.require('b', True)\n",
    "raises": """
def check(context):
    context.report('a', 0.1, 0.2)
    print('noise')
    raise ValueError('no such kernel')
""",
    "aborts": "import os\ndef check(context):\n    os.abort()\n",
    "skips": "def check(context):\n    context.skip('no second GPU')\n",
    "hangs": """
import subprocess, sys
def check(context):
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    context.progress(f'waiting for {child.pid}')
    child.wait()
""",
}


@pytest.fixture(autouse=True)
def planted_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the modules above importable as kimi_mlx.gpu_check.NAME in the processes of the checks."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "sitecustomize.py").write_text(
        f"import kimi_mlx.gpu_check\nkimi_mlx.gpu_check.__path__.append({str(tmp_path)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])]))


def run_planted(name: str, limit_s: float = 60.0) -> CheckResult:
    return run_check(Check(name, name, limit_s), "cpu", "small")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_results_come_from_the_process() -> None:
    result = run_planted("passes")
    assert (result.state, result.comparisons) == ("ok", [Comparison("a", 0.1, 0.2)])
    assert [(item.group, item.name, item.value, item.unit) for item in result.measurements] == [
        ("step", "1 k", 3, "ms")
    ]


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("fails", "failed", ""),
        ("raises", "error", "exit code 1; ValueError: no such kernel"),
        ("aborts", "error", "SIGABRT"),
        ("skips", "skipped", "no second GPU"),
    ],
)
def test_a_check_that_ends_badly_keeps_what_it_reported(name: str, state: str, message: str) -> None:
    result = run_planted(name)
    assert result.state == state
    assert message in result.message
    assert len(result.comparisons) == {"fails": 2, "raises": 1}.get(name, 0)


def test_an_error_in_one_check_does_not_end_the_others() -> None:
    names = ("aborts", "passes")
    results = list(run_checks("cpu", "small", checks=[Check(name, name) for name in names]))
    assert [result.state for result in results] == ["error", "ok"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_a_check_that_hangs_is_ended_with_its_processes() -> None:
    result = run_planted("hangs", limit_s=3.0)
    assert result.state == "timeout"
    assert "not finished after 3 s, at: waiting for" in result.message
    wait_until_ended(int(result.message.rpartition(" ")[2]))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_closing_the_iterator_ends_the_running_check() -> None:
    pids: list[int] = []

    def interrupt(check: Check, text: str) -> None:
        if text.startswith("waiting"):
            pids.append(int(text.rpartition(" ")[2]))
            raise KeyboardInterrupt

    running = run_checks("cpu", "small", interrupt, [Check("hangs", "hangs")])
    with closing(running), pytest.raises(KeyboardInterrupt):
        next(running)
    wait_until_ended(pids[0])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_a_check_ends_with_its_parent(tmp_path: Path) -> None:
    """Also if the parent is killed."""
    code = (
        "from kimi_mlx.gpu_check.checks import Check\nfrom kimi_mlx.gpu_check.runner import run_check\n"
        "run_check(Check('hangs', 'hangs'), 'cpu', 'small', lambda check, text: print(text, flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        pid = next(int(line.rpartition(" ")[2]) for line in parent.stdout if line.startswith("waiting"))
        parent.send_signal(signal.SIGKILL)
    wait_until_ended(pid)


def test_the_device_is_described() -> None:
    description = describe("cpu")
    assert description["kind"] == "cpu"
    assert set(description["versions"]) == {"kimi_mlx", "mlx", "python", "system"}


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_to_install() -> None:
    with pytest.raises(UsageError, match="has no GPU on this machine") as caught:
        describe("gpu")
    assert caught.value.hint is not None
    assert "pip install 'mlx[cuda13]'" in caught.value.hint
