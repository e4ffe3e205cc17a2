"""Defaults of options from config.toml and presets: precedence, sources, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kimi_mlx.cli.app import app
from kimi_mlx.cli.command_list import load_command
from kimi_mlx.cli.option_defaults import (
    ALTERNATIVES,
    LAUNCHED,
    NOT_ON_HOSTS,
    ONE_CALL,
    PATHS,
    SECRETS,
    option_sources,
)
from kimi_mlx.cli.option_file import SHARED_KEYS, TABLES, config_path
from kimi_mlx.errors import UsageError
from kimi_mlx.services.service import LOG_VARIABLE


class Files:
    """The user's folder of config.toml and presets."""

    def __init__(self, folder: Path):
        self.folder = folder

    def config(self, text: str) -> None:
        (self.folder / "config.toml").write_text(text)

    def preset(self, name: str, text: str) -> Path:
        path = self.folder / "presets" / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "kimi-mlx"
    folder.mkdir()
    return Files(folder)


def parse(name: str, *words: str, launched: bool = False) -> Any:
    command = load_command(name)
    root = type(command.make_context(name, ["--help"], resilient_parsing=True))(command, info_name="kimi-mlx")
    if launched:
        root.meta[LAUNCHED] = True
    return command.make_context(name, list(words), parent=root)


def test_without_files_nothing_is_set(files: Files) -> None:
    context = parse("chat")
    assert option_sources(context) == {}
    assert context.params["model"] is None
    assert context.params["ranks"] == 1


def test_a_service_keeps_the_values_of_its_installation(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_VARIABLE, "service.log")
    for text in ("[serve]\nport = 9000\n", "nonsense"):
        files.config(text)
        assert option_sources(parse("serve")) == {}


def test_the_command_line_beats_a_preset_beats_config_toml(files: Files) -> None:
    files.config('model = "kimi-k2"\n[chat]\ntemperature = 0.5\ntop_p = 0.8\nmin_p = 0.1\n[serve]\nport = 9000\n')
    files.preset("coder", 'model = "moonlight"\ntemperature = 0.1\ntop_p = 0.9\n')
    context = parse("chat", "--preset", "coder", "-t", "0.3")
    names = ("model", "temperature", "top_p", "min_p")
    assert [context.params[name] for name in names] == ["moonlight", 0.3, 0.9, 0.1]
    assert option_sources(context) == {
        "preset": "option",
        "temperature": "option",
        "top_p": "preset coder",
        "model": "preset coder",
        "min_p": "config.toml",
    }
    served = parse("serve")
    assert (served.params["port"], served.params["model"]) == (9000, "kimi-k2")


def test_the_environment_stands_between_a_preset_and_config_toml(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.config('[chat]\nmodel = "kimi-k2"\n')
    preset = files.preset("small", 'model = "moonlight"\n')
    monkeypatch.setenv("KIMI_MLX_MODEL", "kimi-mini-vl")
    assert parse("chat").params["model"] is None  # model_name() then takes the variable
    assert parse("chat", "--preset", str(preset)).params["model"] == "moonlight"
    assert parse("chat", "kimi-mini", "--preset", str(preset)).params["model"] == "kimi-mini"


def test_options_whose_value_may_be_left_out(files: Files) -> None:
    files.config("[chat]\ntemperature = 0.5\n")
    for words in (["--continue"], ["-c", "-p", "hi"], ["--continue", "abc"]):
        params = parse("chat", *words).params
        assert (params["continue_"], params["temperature"]) == ("abc" if "abc" in words else "", 0.5)


def test_a_table_beats_the_keys_above_the_tables(files: Files) -> None:
    files.config('model = "kimi-k2"\nranks = 2\n[bench]\nmodel = "moonlight"\n')
    context = parse("bench")
    assert (context.params["model"], context.params["ranks"]) == ("moonlight", 2)


def test_switches_lists_and_sizes(files: Files) -> None:
    files.config(
        '[chat]\nthinking = false\nno_log = true\ncache_memory = "2GB"\n'
        'expert_memory = "35%"\n'
        '[serve]\nserved_name = ["a", "b"]\nallow_host = "c"\n[launch]\nhosts = ["mac-a", "mac-b"]\n'
    )
    chat, serve = parse("chat").params, parse("serve").params
    assert (chat["thinking"], chat["no_log"], chat["cache_memory"]) == (False, True, 2 * 10**9)
    assert chat["expert_memory"] == "35%"
    assert serve["expert_memory"] == "auto"
    assert (serve["served_name"], serve["allow_host"]) == (["a", "b"], ["c"])
    assert parse("launch").params["hosts"] == "mac-a,mac-b"
    assert parse("chat", "--thinking").params["thinking"] is True


def test_paths_are_relative_to_their_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.config('cache_dir = "cache"\n')
    files.preset("p", 'system_file = "p.md"\nmodel = "./Kimi"\nmcp = ["a.json", "/b.json"]\n')
    monkeypatch.setenv("HOME", "/home/me")
    params = parse("chat", "--preset", "p").params
    assert params["cache_dir"] == files.folder / "cache"
    assert params["system_file"] == f"{files.folder}/presets/p.md"
    assert params["model"] == f"{files.folder}/presets/Kimi"
    assert params["mcp"] == [f"{files.folder}/presets/a.json", "/b.json"]
    files.config('cache_dir = "~/cache"\nmodel = "owner/name"\n')
    params = parse("chat").params
    assert (params["cache_dir"], params["model"]) == (Path("/home/me/cache"), "owner/name")


def test_an_option_hides_weaker_ones_that_it_excludes(files: Files) -> None:
    files.config('[chat]\nsystem = "Be brief."\nurl = "http://mac-a:8080"\n[launch]\nhosts = "a,b"\n')
    params = parse("chat", "--system-file", "x.md", "--load").params
    assert (params["system"], params["system_file"], params["url"]) == (None, "x.md", None)
    assert parse("chat", "--preset", str(files.preset("p", 'system_file = "p"'))).params["system"] is None
    assert parse("launch", "--hostfile", "two.json").params["hosts"] is None
    assert parse("chat", "--ranks", "2").params["url"] is None


def test_launched_commands_ignore_defaults_for_one_machine(files: Files) -> None:
    files.config('ranks = 2\n[chat]\nurl = "http://mac-a:8080"\ntemperature = 0.5\n')
    params = parse("chat", launched=True).params
    assert (params["ranks"], params["url"], params["temperature"]) == (1, None, 0.5)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[chat]\ntemprature = 1", "[chat] has an unknown key `temprature`", "did you mean `temperature`?"),
        ("[chat]\ntop-p = 1", "unknown key `top-p`", "did you mean `top_p`?"),
        ("[chats]\nx = 1", "unknown table [chats]", "did you mean `chat`?"),
        ("temperature = 1", "unknown key `temperature` outside of tables", "[chat]"),
        ("[chat]\ntemperature = 3", "[chat] sets temperature to 3: ", None),
        ('[chat]\ntemperature = "hot"', "[chat] sets temperature to 'hot': ", None),
        ("[chat]\ntop_k = 1.5", "[chat] sets top_k to 1.5", None),
        ('[chat]\nthinking = "yes"', "is not true or false", None),
        ("[chat]\nmax_tokens = true", "is not a number", None),
        ("[chat]\nsystem = 5", "sets system to 5, which is not a text in quotes", None),
        ('[chat]\nprompt = "hi"', "sets `prompt`, which belongs to a single call", "command line"),
        ('strategy = "fast"', "sets strategy to 'fast'", None),
        ("[chat]\ntemperature = ", "is not TOML", 'model = "kimi-k2"'),
        ("[chat]\nmodel = kimi-k2", "is not TOML", None),
        ("x = " + "[" * 5000, "is not TOML", None),
    ],
)
def test_errors_name_file_table_and_key(files: Files, text: str, message: str, hint: str | None) -> None:
    files.config(text)
    with pytest.raises(UsageError) as error:
        parse("chat")
    assert error.value.message.startswith(f"`{files.folder}/config.toml`")
    assert message in error.value.message
    assert hint is None or hint in (error.value.hint or "")


def test_secrets_are_refused(files: Files) -> None:
    files.config('[serve]\napi_key = "secret"\n')
    with pytest.raises(UsageError, match="has a secret, `api_key`"):
        parse("serve")


def test_files_that_cannot_be_read(files: Files) -> None:
    (files.folder / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not TOML"):
        parse("chat")
    (files.folder / "config.toml").unlink()
    (files.folder / "config.toml").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        parse("chat")


def test_help_works_with_a_broken_file(files: Files) -> None:
    files.config("[chat")
    assert CliRunner().invoke(app, ["chat", "--help"]).exit_code == 0
    assert isinstance(CliRunner().invoke(app, ["chat", "-p", "hi"]).exception, UsageError)


def test_presets_are_found_by_path_and_by_name(files: Files, tmp_path: Path) -> None:
    files.preset("coder", "temperature = 0.1")
    own = tmp_path / "own.toml"
    own.write_text("temperature = 0.2")
    assert parse("chat", "--preset", str(own)).params["temperature"] == 0.2
    assert option_sources(parse("chat", "--preset", str(own)))["temperature"] == "preset own"
    with pytest.raises(UsageError, match="no preset `code`") as error:
        parse("chat", "--preset", "code")
    assert "`coder`" in str(error.value.hint)
    own.write_text("[chat]\ntemperature = 0.2")
    with pytest.raises(UsageError, match=r"has a table \[chat\]"):
        parse("chat", "--preset", str(own))


def test_the_names_of_special_options_are_those_of_options() -> None:
    names = {parameter.name.rstrip("_") for table in TABLES for parameter in load_command(table).params}
    assert ONE_CALL | SECRETS | PATHS | NOT_ON_HOSTS | set(SHARED_KEYS) | set().union(*ALTERNATIVES) <= names


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["config", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def sources(*words: str) -> dict[str, tuple[Any, str]]:
    options = json.loads(run(*words, "--json"))["options"]
    return {item["name"]: (item["value"], item["source"]) for item in options}


def test_config_shows_where_values_come_from(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.config('cache_dir = "cache"\n[chat]\ntemperature = 0.5\n')
    files.preset("coder", "seed = 7")
    monkeypatch.setenv("KIMI_MLX_MODEL", "kimi-mini-vl")
    monkeypatch.setenv("KIMI_MLX_API_KEY", "secret")
    found = sources("chat", "--preset", "coder")
    assert found["model"] == ("kimi-mini-vl", "$KIMI_MLX_MODEL")
    assert found["temperature"] == (0.5, "config.toml")
    assert found["seed"] == (7, "preset coder")
    assert found["max_tokens"][1] == "generation_config.json"
    assert found["ranks"] == (1, "built-in")
    assert found["url"] == (None, "built-in")
    assert sources("serve")["api_key"] == ("(set)", "$KIMI_MLX_API_KEY")
    assert "secret" not in run("serve") + run("serve", "--json")
    monkeypatch.setenv("KIMI_MLX_MODEL", "kimi-k2.5")
    assert sources("chat")["temperature"] == (0.5, "config.toml")
    files.config("[chat]\nthinking = false\n")
    assert sources("chat")["temperature"] == (0.6, "model card")  # 1.0 with thinking
    assert sources("chat")["max_tokens"] == (None, "built-in")
    monkeypatch.setenv("KIMI_MLX_MODEL", "no-such-model")
    assert sources()["top_p"] == (None, "built-in")


def test_config_prints_a_table_and_the_path(files: Files) -> None:
    assert run("path").strip() == str(config_path())
    output = run()
    assert "(does not exist)" in output
    assert "kimi-mini" in output
    assert "Not set: " in output
    files.config("[chat]\ntemperature = 0.5\n")
    first = run().splitlines()[1]
    assert first.split() == ["temperature", "0.5", "config.toml"]  # what is set comes first
    assert json.loads(run("path", "--json")) == {"path": str(config_path()), "exists": True}
    assert isinstance(CliRunner().invoke(app, ["config", "serve", "--preset", "x"]).exception, UsageError)
