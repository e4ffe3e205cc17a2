"""Start-up of the command line: what it imports, and the static list of commands."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest

from kimi_mlx.cli.command_list import COMMANDS, OTHER_TOOLS_COMMANDS
from tests.command import call

# not pydantic: Typer itself imports it for an unknown command
HEAVY = ("rich", "prompt_toolkit", "huggingface_hub", "mlx", "numpy", "jinja2", "starlette", "mlx_lm")
LIGHT = {
    "kimi_mlx",
    "kimi_mlx.cli",
    "kimi_mlx.cli.app",
    "kimi_mlx.cli.command_list",
    "kimi_mlx.cli.signals",
    "kimi_mlx.cli.standard_streams",
    "kimi_mlx.cli.start_status",
    "kimi_mlx.cli.terminal_state",
    "kimi_mlx.errors",
    "kimi_mlx.settings",
    "kimi_mlx.version",
}
LIGHT_PACKAGES = {
    f"kimi_mlx.{name}"
    for name in (
        "cluster",
        "engine",
        "files",
        "folders",
        "model",
        "model_files",
        "parallel",
        "planner",
        "services",
        "session",
        "sizing",
        "units",
        "weights",
    )
}
"""Packages of which a command's options import small modules."""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-such-command"], ["--no-such-option"]])
def test_start_up_imports_only_these_modules(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from kimi_mlx.cli.app import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        "except Exception as error: assert type(error).__name__ == 'UsageError', error\n"
        "print('modules:', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    modules = done.stdout.rpartition("modules:")[2].split()
    of_version = {"kimi_mlx.cli.version_report"} if arguments == ["--version"] else set()
    assert {name for name in modules if name.split(".")[0] == "kimi_mlx"} == LIGHT | of_version
    assert [name for name in modules if name.split(".")[0] in HEAVY] == []


def test_a_usage_error_of_any_command_imports_no_heavy_module() -> None:
    code = (
        "import sys\n"
        "from kimi_mlx.cli.app import app\n"
        f"for name in {[info.name for info in COMMANDS]!r}:\n"
        "    try: app([name, '--no-such-option'])\n"
        "    except SystemExit as end: assert end.code == 2\n"
        "    except BaseException as error: assert type(error).__name__ == 'UsageError', error\n"
        "print('modules:', *sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    modules = done.stdout.rpartition("modules:")[2].split()
    assert [name for name in modules if name.split(".")[0] in HEAVY] == []
    of_others = {name for name in modules if name.startswith("kimi_mlx.") and not name.startswith("kimi_mlx.cli.")}
    assert {name for name in of_others if name.count(".") == 1} <= LIGHT | LIGHT_PACKAGES
    assert len(of_others) < 45


SINGLE_COMMANDS = [command for info in COMMANDS for command in (info.commands or [info])]
"""All commands, those of groups too, without the groups."""


@pytest.mark.parametrize("info", SINGLE_COMMANDS, ids=lambda info: info.name)
def test_summaries_are_short_and_equal_the_docstrings(info: object) -> None:
    name, summary, module = (getattr(info, attribute) for attribute in ("name", "summary", "module"))
    command = getattr(import_module(f"kimi_mlx.cli.{module or name}"), name)
    assert (inspect.getdoc(command) or "").splitlines()[0] == summary
    assert len(summary) <= 50


def test_the_list_of_commands_is_whole() -> None:
    shown = call("--help").stdout
    assert "..." not in shown.partition("Commands:")[2]
    assert all(f"  {info.name} " in shown for info in COMMANDS if not info.is_hidden)
    assert " check " not in shown


@pytest.mark.parametrize("name", OTHER_TOOLS_COMMANDS)
def test_commands_of_other_tools_get_a_hint(name: str) -> None:
    done = call(name, "kimi-k2", "--all", "-q", "--help")
    assert done.returncode == 2
    assert "hint: type `kimi-mlx " in done.stderr or name == "stop"
    assert f"  {name} " not in call("--help").stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["modles"], "did you mean `models`?"),
        (["frobnicate"], "type `kimi-mlx --help` for the commands"),
        (["remove", "moonlight"], "type `kimi-mlx rm MODEL`"),
        (["help"], "type `kimi-mlx --help`, or `kimi-mlx COMMAND --help`"),
        (["version"], "type `kimi-mlx --version`"),
        (["-v"], "type `kimi-mlx --version`"),
        (["-V"], "type `kimi-mlx --version`"),
    ],
)
def test_a_mistyped_command_gets_a_hint(words: list[str], hint: str) -> None:
    done = call(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: kimi-mlx has no {'option' if words[0].startswith('-') else 'command'} ")
    assert done.stderr.endswith(f"hint: {hint}\n")


def test_a_usage_error_as_json_names_the_help_of_the_command() -> None:
    assert json.loads(call("chat", "--bogus", "--json").stdout)["hint"] == "type `kimi-mlx chat --help` for the options"
    assert json.loads(call("--bogus", "--json").stdout)["hint"] == "type `kimi-mlx --help` for the options"


def test_a_name_that_may_be_a_prompt_gets_a_hint() -> None:
    assert "hint: to send it as a prompt, type `kimi-mlx chat -p 'hello you'`" in call("chat", "hello you").stderr
    assert "did you mean `moonlight`?" in call("chat", "moonlite").stderr


@pytest.mark.parametrize("option", [("--temp", "9"), ("--temp", "-1"), ("--top-p", "2"), ("--min-p", "2")])
def test_sampling_options_have_the_range_of_the_server(option: tuple[str, str]) -> None:
    done = call("chat", "-p", "hi", *option)
    assert done.returncode == 2
    assert "should be " in done.stderr
    assert option[0] in done.stderr
    assert "0<=x<=2" in call("chat", "--help").stdout.replace(".0", "")


def test_temp_is_temperature_and_help_has_panels() -> None:
    shown = call("chat", "--help").stdout
    assert "--temperature, --temp" in shown
    panels = [line for line in shown.splitlines() if line in ("Options:", "Model:", "Sampling:", "Advanced:")]
    assert panels == ["Options:", "Model:", "Sampling:", "Advanced:"]
    assert "--cache-memory" in shown
    assert "--cache-dir" in shown
