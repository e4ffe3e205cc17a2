"""`kimi-mlx chat` and `models` as a user runs them: real processes, the real kimi-mini."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from kimi_mlx.model.config import read_json
from kimi_mlx.store.locate import ensure_downloaded
from tests.command import call
from tests.drafts import draft_config, write_draft
from tests.fakes import KIMI_MINI
from tests.processes import start

QUESTION = "What are you?"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "two-red-circles.png"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from kimi_mlx.cli.app import main; main()", *arguments]


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ranks_of(front: subprocess.Popen[str] | subprocess.Popen[bytes]) -> list[int]:
    """Processes of the ranks that a front has started: children of their guards."""
    guards = _children(front.pid)
    return [rank for guard in guards for rank in _children(guard)]


def _children(pid: int) -> list[int]:
    children = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    if not children:  # macOS
        children = [subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout]
    return [int(child) for child in " ".join(children).split()]


def are_gone(pids: list[int], limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        alive = [
            pid
            for pid in pids
            if subprocess.run(["kill", "-0", str(pid)], capture_output=True, check=False).returncode == 0
        ]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def test_stdout_has_only_the_answer_and_stderr_the_statistics() -> None:
    done = run("chat", "-p", "hi")
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "tok/s" not in done.stdout
    assert "tok/s" in done.stderr
    assert "first token" in done.stderr
    assert len(done.stderr.splitlines()) == 1  # not wrapped: no terminal reads it


@pytest.mark.slow
def test_a_prompt_from_a_pipe_is_the_same() -> None:
    expected = call("chat", "-p", "Who are you?").stdout
    assert run("chat", stdin="Who are you?").stdout == expected
    assert call("chat", "-p", "-", stdin="Who are you?").stdout == expected


def test_json_has_text_reasoning_and_statistics() -> None:
    done = call("chat", "--json", "-p", "hi", "--max-tokens", "20", "-t", "0")
    answer = json.loads(done.stdout)
    expected = {"text", "reasoning", "tool_calls", "finish_reason", "usage", "placement", "statistics"}
    assert set(answer) == {*expected, "conversation"}
    assert answer["usage"]["completion_tokens"] == answer["statistics"]["generated_tokens"] <= 20
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_answer_as_one_process_does() -> None:
    alone, ring = call("chat", "-p", QUESTION), run("chat", "-p", QUESTION, "--ranks", "2")
    assert ring.returncode == 0, ring.stderr
    assert ring.stdout == alone.stdout
    assert len(alone.stdout) > 50


def test_a_wrong_name_suggests_near_names() -> None:
    done = call("chat", "kimi-mni", "-p", "hi")
    assert done.returncode == 2
    assert "there is no model `kimi-mni`" in done.stderr
    assert "`kimi-mini`" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("chat", "-p", ""), "the prompt is empty"),
        (("chat", "-p", "hi", "--temperature", "-3"), "greater than or equal to 0"),
        (("chat", "-p", "hi", "--ranks", "0"), "--ranks"),
        (("chat", "-p", "hi", "--ranks", "50"), "but there are 50 ranks"),
        (("chat", "-p", "hi", "--dtype", "float99"), "float99"),
        (("chat", "kimi-k3", "-p", "hi"), "Kimi K3"),
        (("chat", "/", "-p", "hi"), "`/config.json` does not exist"),
        (("no-such-command",), "no-such-command"),
        (("chat", "kimi-mini", "hello there"), "to send it as a prompt, type `-p 'hello there'`"),
    ],
)
def test_bad_input_gets_a_clear_error(arguments: tuple[str, ...], words: str) -> None:
    done = call(*arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert done.stdout == ""


def test_a_base_model_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = shutil.ignore_patterns("chat_template.jinja", "*.safetensors")
    folder = shutil.copytree(ensure_downloaded("kimi-mini"), tmp_path / "base", ignore=ignored)
    done = call("chat", str(folder), "-p", "hi")
    assert done.returncode == 1
    assert f"`{folder}` has no chat template" in " ".join(done.stderr.split())


def test_errors_are_json_if_results_are() -> None:
    for arguments, code in ((("chat", "no-such-model", "-p", "hi", "--json"), 2), (("rm", "moonlight", "--json"), 1)):
        done = call(*arguments)
        assert done.returncode == code
        assert set(json.loads(done.stdout)) == {"error", "hint"}
        assert done.stderr == ""
    wrong = json.loads(call("models", "--json", "--no-such-option").stdout)
    assert "--no-such-option" in wrong["error"]
    assert json.loads(call("plan", "kimi-k2", "--machines", "m9", "--json").stdout)["error"] == "unknown machine `m9`"


def test_a_prompt_beyond_the_context_is_an_error() -> None:
    done = call("chat", stdin="1 " * 70_000)
    assert done.returncode == 1
    assert "the context holds 65536" in done.stderr


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_front_and_all_ranks(endless_model: Path, number: signal.Signals, code: int) -> None:
    front = start(command("chat", str(endless_model), "--ranks", "2", "--no-thinking", "-p", "hi"), text=True)
    assert front.stdout is not None
    assert front.stdout.read(1)  # it is answering
    pids = ranks_of(front)
    assert len(pids) == 2
    front.send_signal(number)
    _, errors = front.communicate(timeout=60)
    assert front.returncode == code
    assert "Traceback" not in errors
    assert are_gone(pids, 10)


@pytest.mark.sweep
@pytest.mark.ranks
def test_an_answer_continues_after_a_rank_is_killed(endless_model: Path) -> None:
    options = ("chat", str(endless_model), "--no-thinking", "-t", "0", "--max-tokens", "150", "-p", "hi")
    expected = call(*options).stdout
    # bufsize=0: reads no more of the pipe than it needs
    front = start(command(*options, "--ranks", "2"), bufsize=0)
    assert front.stdout is not None
    begin = front.stdout.read(1)
    pids = ranks_of(front)
    os.kill(pids[1], signal.SIGKILL)
    text, errors = front.communicate(timeout=60)
    assert (front.returncode, (begin + text).decode()) == (0, expected)
    output = " ".join(errors.decode().split())
    assert f"(process {pids[1]}) was ended by SIGKILL" in output
    assert "reconnecting in 1 s, attempt 1 of 3" in output
    assert "the answer continues after" in output
    assert are_gone(pids, 10)


def test_a_checkpoint_without_its_tower_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(ensure_downloaded("kimi-mini-vl"), tmp_path / "no-tower", ignore=ignored)
    tensors = mx.load(str(ensure_downloaded("kimi-mini-vl") / "model.safetensors"))
    assert isinstance(tensors, dict)
    text = {name: array for name, array in tensors.items() if name.startswith("language_model.")}
    mx.save_safetensors(str(folder / "model.safetensors"), text, {"format": "mlx"})
    assert call("chat", str(folder), "-p", "hi", "--no-thinking", "--max-tokens", "2").returncode == 0
    monkeypatch.setattr("kimi_mlx.session.open.open_session", lambda *args: pytest.fail("the model was loaded"))
    done = call("chat", str(folder), "-p", "What do you see?", "--image", str(PICTURE))
    assert done.returncode == 1
    assert "does not see images: this checkpoint has no vision tower" in " ".join(done.stderr.split())


def test_models_lists_what_is_here() -> None:
    done = call("models")
    assert done.returncode == 0
    assert "kimi-mini" in done.stdout
    listed = {entry["alias"]: entry for entry in json.loads(call("models", "--json").stdout)}
    assert listed["kimi-mini"]["folder"]
    assert listed["kimi-k2"]["size_bytes"] > 500e9


def test_the_model_of_the_environment_is_used() -> None:
    done = call("chat", "-p", "hi", variables={"KIMI_MLX_MODEL": "no-such-model"})
    assert done.returncode == 2
    assert "`no-such-model`" in done.stderr


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("kimi-mlx 0.")
    assert "Examples:" in call("chat", "--help").stdout


def test_an_image_with_a_prompt() -> None:
    options = ("chat", "kimi-mini-vl", "-p", "What do you see?", "-t", "0", "--max-tokens", "5", "--json")
    answer = json.loads(call(*options, "--image", str(PICTURE)).stdout)
    without = json.loads(call(*options).stdout)
    assert answer["statistics"]["encode_s"] > 0 == without["statistics"]["encode_s"]
    extra = answer["statistics"]["prompt_tokens"] - without["statistics"]["prompt_tokens"]
    assert extra > 24  # tokens of the picture and around it
    twice = json.loads(call(*options, "-i", str(PICTURE), "-i", str(PICTURE)).stdout)
    assert twice["statistics"]["prompt_tokens"] == without["statistics"]["prompt_tokens"] + 2 * extra


def test_only_the_answer_is_on_stdout_beside_an_image() -> None:
    done = call("chat", "kimi-mini-vl", "-p", "What?", "-t", "0", "--max-tokens", "5", "--image", str(PICTURE))
    assert "two-red-circles.png · " in done.stderr
    assert "two-red" not in done.stdout
    assert "\x1b" not in done.stderr


def test_names_of_files_in_errors_do_not_control_the_terminal(tmp_path: Path) -> None:
    name = "a\x1b[31m\x07\x9b2J"
    (tmp_path / f"{name}.png").touch()
    for missing in (f"{name}.png", f"{name}.pn"):  # broken; missing, with a similar name in the hint
        done = call("chat", "kimi-mini-vl", "-i", str(tmp_path / missing), "-p", "What do you see?")
        assert "a\\x1b[31m\\x07\\x9b2J.png`" in done.stderr
        assert done.stderr.replace("\n", "").isprintable()


def test_a_file_above_the_limit_names_its_size(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(5_000_000_000)
    done = call("chat", "kimi-mini-vl", "-i", str(path), "-p", "What do you see?")
    assert "the file has 5.0 GB, more than 32.0 MB" in done.stderr


def test_an_image_through_a_pipe_is_no_prompt() -> None:
    done = call("chat", "kimi-mini-vl", "-p", "What is it?", stdin=PICTURE.read_bytes().decode("latin-1"))
    assert done.returncode == 2
    assert "error: the piped input is not text: byte 9 is zero" in done.stderr
    assert "hint: give an image by name: `-f FILE`" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words", "hint"),
    [
        (("kimi-mini", "-i", str(PICTURE)), "`kimi-mini` does not see images", "`kimi-mlx models` lists"),
        (("kimi-k2", "-i", str(PICTURE)), "`kimi-k2` does not see images", "`kimi-mlx models` lists"),
        (("kimi-mini-vl", "-i", f"{PICTURE}x"), f"there is no file `{PICTURE}x`", f"did you mean `{PICTURE}`?"),
        (("kimi-mini-vl", "-i", str(PICTURE.parent)), "is a folder, not an image", "name a file in it"),
        (("kimi-mini-vl", "-i", "https://example.org/a.png"), "an image is a file here, not a URL", "curl -O"),
        (("-i", str(PICTURE), str(PICTURE)), "is no model, but the name of an image", "write `--image` before each"),
        (("kimi-mini-vl", "-i", __file__), f"`{__file__}`: it is a text file", "send it as text"),
        (("kimi-mini-vl", "-i", "~/no.png"), f"there is no file `{Path.home()}/no.png`", ""),
        (("kimi-mini-vl", *(101 * ["-i", str(PICTURE)])), "101 images and videos are more than 100", "send fewer"),
        (("kimi-mini-vl", "--video", __file__), f"`{__file__}`: it is not a video file", ""),
    ],
)
def test_a_wrong_image_is_an_error_before_the_model_is_loaded(
    arguments: tuple[str, ...], words: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_mlx.session.open.open_session", lambda *args: pytest.fail("the model was loaded"))
    done = call("chat", *arguments, "-p", "What do you see?")
    assert done.returncode in (1, 2)
    assert words in " ".join(done.stderr.split())
    assert hint in " ".join(done.stderr.split())
    assert done.stdout == ""


@pytest.mark.slow
def test_a_draft_model_changes_the_number_of_steps_but_not_the_text() -> None:
    plain, drafted, off = (
        json.loads(run("chat", "-t", "0", "-p", QUESTION, "--json", *options).stdout)
        for options in ((), ("--draft", "auto", "--speculate", "5"), ("--draft", "auto", "--speculate", "0"))
    )
    assert drafted["text"] == off["text"] == plain["text"]
    assert drafted["statistics"]["generated_tokens"] == plain["statistics"]["generated_tokens"]
    assert (off["statistics"]["drafted_tokens"], off["statistics"]["drafts_off"]) == (0, None)


def test_a_draft_model_of_another_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_draft(tmp_path, draft_config({**read_json(KIMI_MINI / "config.json"), "vocab_size": 99}))
    result = call("chat", "-p", QUESTION, "--draft", str(tmp_path))
    assert result.returncode == 1
    assert "a vocabulary of 99, but the model has 1792" in result.stderr
    assert "kimi-mlx models" in result.stderr
