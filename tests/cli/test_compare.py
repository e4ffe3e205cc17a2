"""`kimi-mlx compare` and `kimi-mlx importance`: output, texts that cannot be used, models that do not match."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kimi_mlx.cli.app import app
from kimi_mlx.cli.chat.files import text_files
from kimi_mlx.cli.quality_models import _conversations
from kimi_mlx.errors import KimiMlxError, TextError, UsageError, WeightsError
from kimi_mlx.store.locate import ensure_downloaded
from kimi_mlx.weights import importance as importance_file
from kimi_mlx.weights.importance import Importance
from tests.checkpoints import FORMATS

TEXT = "What is 12 + 30? The code of Anna is 4711."


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)], input=stdin)
    if isinstance(result.exception, KimiMlxError | OSError):
        raise result.exception
    return result


def test_a_model_equals_itself(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    result = run("compare", "kimi-mini", "kimi-mini", tmp_path / "text.txt", TEXT)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:2] == ["A kimi-mini, 2.1 MB", "B kimi-mini, 2.1 MB"]
    assert lines[2].startswith("2 texts, ")
    assert lines[2].endswith("tokens in windows of at most 2,048, raw, without the chat template")
    assert "KL(A || B) mean 0, p90 0, max 0" in lines
    assert "top-1 agreement 100.00 %" in lines


@pytest.mark.slow
def test_json_is_one_document() -> None:
    raw, chat = (
        json.loads(run("compare", "kimi-mini", "kimi-mini", TEXT, "--json", *more).stdout) for more in ([], ["--chat"])
    )
    assert (raw["prompt"], chat["prompt"]) == ("raw", "chat")
    assert chat["tokens"] > raw["tokens"]
    assert raw["kl_mean"] == raw["kl_max"] == 0
    assert raw["perplexity_a"] == raw["perplexity_b"]
    assert raw["a"] == {"model": "kimi-mini", "bytes": 2142400}


@pytest.mark.slow
def test_conversations_are_rendered_with_their_answers(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "4711"}]
    line = json.dumps({"messages": messages}) + "\n"
    (tmp_path / "chats.jsonl").write_text(line * 2)
    chats, text = (
        json.loads(run("compare", "kimi-mini", "kimi-mini", words, "--json", "--chat").stdout)
        for words in (tmp_path / "chats.jsonl", TEXT)
    )
    assert chats["positions"] == chats["tokens"] - 2
    assert chats["tokens"] > 2 * text["tokens"]


def test_tokens_beyond_the_limit_are_counted() -> None:
    report = json.loads(run("compare", "kimi-mini", "kimi-mini", TEXT, "--tokens", "10", "--json").stdout)
    assert report["tokens"] == 10
    assert report["tokens_left_out"] > 0
    assert (
        "tokens are left out: --tokens limits them to 10"
        in run("compare", "kimi-mini", "kimi-mini", TEXT, "--tokens", "10").stderr
    )


def test_other_vocabularies_and_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`kimi-mini` has a vocabulary of 1,792 tokens and `.*fp8` one of 64"):
        run("compare", "kimi-mini", FORMATS / "fp8", TEXT)
    other = shutil.copytree(ensure_downloaded("kimi-mini"), tmp_path / "other")
    lines = (other / "tiktoken.model").read_text().splitlines()
    words = [line.split()[0] for line in lines]
    words[256:] = words[:255:-1]  # merges in another order
    (other / "tiktoken.model").write_text("".join(f"{word} {rank}\n" for rank, word in enumerate(words)))
    with pytest.raises(UsageError, match=r"have different tokenizers: text 1 has \d+ tokens with the first and \d+"):
        run("compare", "kimi-mini", other, TEXT)
    with pytest.raises(TextError, match="no tokenizer"):
        run("compare", FORMATS / "fp8", FORMATS / "fp8", TEXT)


def test_a_model_that_is_not_here_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="the files of `kimi-k2` are not on this machine"):
        run("compare", "kimi-k2", "kimi-mini", TEXT)


@pytest.mark.parametrize("command", ["compare", "importance"])
def test_texts_that_cannot_be_used(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(*texts: str | Path, stdin: str | None = None) -> Result:
        end = ["kimi-mini", *texts] if command == "compare" else [*texts, "-o", tmp_path / "out"]
        return run(command, "kimi-mini", *end, stdin=stdin)

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 4)
    cases = {
        "`.*empty.txt` is empty": [tmp_path / "empty.txt"],
        "a text is empty": [""],
        "is not a text file|is not text": [tmp_path / "binary.bin"],
        "does not exist|no such file|there is no": [tmp_path / "missing.txt"],
        "a folder": [tmp_path],
        "`-` is given twice": ["-", "-"],
        "at least 2": ["a"],
    }
    for pattern, texts in cases.items():
        with pytest.raises(UsageError, match=pattern):
            attempt(*texts)
    with pytest.raises(UsageError, match="standard input is empty"):
        attempt("-", stdin="")
    monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 10)
    with pytest.raises(UsageError, match="standard input has more than the limit of 10 B"):
        attempt("-", stdin=TEXT)
    assert not (tmp_path / "out").exists()


def test_a_window_beyond_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a window of 65,537 tokens is longer than the model's context of 65,536"):
        run("compare", "kimi-mini", "kimi-mini", TEXT, "--window", "65537")


@pytest.mark.slow
def test_importance_is_written_and_used(tmp_path: Path) -> None:
    path = tmp_path / "mini.importance"
    report = json.loads(run("importance", "kimi-mini", "-", "-o", path, "--json", stdin=TEXT * 20).stdout)
    assert report["file"] == str(path)
    assert report["experts"] == 48
    assert report["bytes"] == path.stat().st_size
    metadata = Importance(path).metadata
    assert metadata["model"] == "kimi-mini"
    assert metadata["tokens"] == str(report["tokens"])
    options = ("--preset", "2bit", "--importance", path)
    plan = json.loads(run("convert", "kimi-mini", tmp_path / "out", *options, "--dry-run", "--json").stdout)
    assert any(note.startswith("these tensors are re-quantized") for note in plan["notes"])
    assert plan["search_s"] > 0
    with pytest.raises(WeightsError, match="inputs and the model"):
        run("convert", FORMATS / "fp8", tmp_path / "out", *options)
    with pytest.raises(UsageError, match="--importance has no effect with --scales min-max"):
        run("convert", "kimi-mini", tmp_path / "out", "--scales", "min-max", "--importance", path)
    with pytest.raises(UsageError, match="--importance has no effect: every matrix is copied unchanged"):
        run("convert", "kimi-mini", tmp_path / "out", "--preset", "4bit", "--importance", path)


def test_output_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, pattern in ((tmp_path, "is a folder"), (tmp_path / "no" / "file", "does not exist")):
        with pytest.raises(UsageError, match=pattern):
            run("importance", "kimi-mini", TEXT, "-o", target)
    (tmp_path / "old").write_text("old")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(importance_file, "rename_durably", full)
    with pytest.raises(OSError, match="No space left"):
        run("importance", "kimi-mini", TEXT, "-o", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("second", ['{"messages": ["Hello"]}', '{"messages": []}', "Hello"])
def test_wrong_conversations_are_refused(second: str) -> None:
    first = json.dumps({"messages": [{"role": "user", "content": "a\u2028b"}]}, ensure_ascii=False)
    assert len(_conversations(f"{first}\n\n{first}\n")) == 2
    with pytest.raises(UsageError, match="line 2"):
        _conversations(f"{first}\n{second}")
    assert _conversations(f"Hello\n{first}") == []


def test_the_hint_for_a_missing_importance_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read") as raised:
        Importance(tmp_path / "none")
    assert "kimi-mlx importance" in str(raised.value.hint)
