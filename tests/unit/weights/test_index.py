"""The files of a checkpoint: the headers decide, whatever the index says."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kimi_mlx.errors import WeightsError
from kimi_mlx.weights.index import INDEX_NAME, checkpoint_files, log_note, read_index, require_small_files


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files with one-letter tensors, such as {"model.safetensors": "ab"}."""
    for file, names in files.items():
        mx.save_safetensors(str(folder / file), {name: mx.ones((2,)) for name in names})


def write_index(folder: Path, value: Any) -> None:
    (folder / INDEX_NAME).write_text(value if isinstance(value, str) else json.dumps({"weight_map": value}))


ONE, TWO, THREE = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
ALL = {ONE: "a", TWO: "b", THREE: "c"}


@pytest.mark.parametrize(
    ("files", "index", "note"),
    [
        (ALL, {"a": ONE, "b": TWO, "c": THREE}, None),
        (ALL, {"a": THREE, "b": ONE, "c": TWO}, None),  # the headers say in which file a tensor is
        (ALL, None, None),
        ({"model.safetensors": "abc"}, None, None),
        ({**ALL, "model.safetensors": "abc"}, {"a": ONE, "b": TWO, "c": THREE}, None),  # a copy of the same tensors
        ({"model.safetensors": "abc"}, {"a": ONE, "b": TWO, "c": THREE}, "lists only files that do not exist"),
        ({"model.safetensors": "abc"}, {"x": ONE}, "lists only files that do not exist"),
        ({"model.safetensors": "abc"}, {}, "lists no files"),
        ({"model.safetensors": "abc"}, "", "lists no files"),
        ({"model.safetensors": "abc"}, "{", "lists no files"),
        ({"model.safetensors": "abc"}, "[]", "lists no files"),
        ({"model.safetensors": "abc"}, '{"metadata": {"total_size": 1}}', "lists no files"),
        ({"model.safetensors": "abc"}, '{"weight_map": []}', "lists no files"),
        (ALL, {"a": ONE, "b": TWO}, f"does not list `{THREE}`"),
        ({ONE: "a", "model.safetensors": "bc"}, {"a": ONE, "b": TWO}, f"lists `{TWO}`, which does not exist"),
    ],
)
def test_headers_win_over_the_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: dict[str, str], index: Any, note: str | None
) -> None:
    write(tmp_path, files)
    if index is not None:
        write_index(tmp_path, index)
    log_note.cache_clear()
    with caplog.at_level(logging.WARNING):
        table = read_index(tmp_path)
        assert read_index(tmp_path) == table
    assert sorted(table) == ["a", "b", "c"]
    assert all(info.file.is_file() for info in table.values())
    messages = [record.message for record in caplog.records]
    if note is None:
        assert messages == []
    else:
        assert any(note in message for message in messages)
        assert len(set(messages)) == len(messages)


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        ({ONE: "a"}, {"a": ONE, "b": TWO, "c": THREE}, f"2 of 3 files .* are missing, first `{TWO}`"),
        ({}, {"a": ONE}, f"1 of 1 files .* are missing, first `{ONE}`"),
        ({ONE: "a", THREE: "c"}, None, r"2 of the 3 files `model-\*-of-00003\.safetensors`"),
        ({ONE: "a", THREE: "c"}, "{", r"2 of the 3 files"),
        ({ONE: "a", "model.safetensors": "c"}, {"a": ONE, "b": TWO}, f"1 of 2 files .* first `{TWO}`"),
        ({"model-a.safetensors": "ab", "model-b.safetensors": "bc"}, None, "tensor `b` is in"),
        ({}, None, "has no `model"),
    ],
)
def test_missing_files_and_ambiguous_tensors_are_named(
    tmp_path: Path, files: dict[str, str], index: Any, message: str
) -> None:
    write(tmp_path, files)
    if index is not None:
        write_index(tmp_path, index)
    with pytest.raises(WeightsError, match=message):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "x" * 5000 + ".safetensors",
        "/etc/model.safetensors",
        "../model.safetensors",
        "a/../../model.safetensors",
        "..",
        "",
        "model\0.safetensors",
        "model\n.safetensors",
        "model.safetensors\n",
        "é" * 200 + ".safetensors",
        "model.bin",
        "C:\\model.safetensors",
        5,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_that_names_a_file_outside_its_folder_is_refused(tmp_path: Path, name: Any) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(WeightsError, match=r"index\.json` names the file .*, which is not a `\*\.safetensors` in"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("name", ["model-00001-of-000061.safetensors", "model 1+x_y.z.safetensors"])
def test_usual_file_names_are_accepted(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    (tmp_path / name).touch()
    assert checkpoint_files(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize(("method", "read"), [("open", read_index), ("is_file", checkpoint_files)])
def test_an_unreadable_file_has_a_hint_about_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, read: Any
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path, {"model.safetensors": "a"})
    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(WeightsError, match="cannot be read: Permission denied") as caught:
        read(tmp_path)
    assert caught.value.hint == "check its permissions"


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize(
    ("target", "kind"),
    [("model.safetensors", "a loop of links"), ("none", "a broken link"), ("/dev/zero", "a device"), (None, "a pipe")],
)
def test_what_is_in_place_of_a_file_is_named(target: str | None, kind: str, has_index: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if target is None:
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    if has_index:
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": path.name}}))
    with pytest.raises(WeightsError, match=f"`.*model.safetensors`.* is {kind}") as raised:
        read_index(tmp_path)
    assert "remove" in (raised.value.hint or "")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja", "notes.json"])
def test_what_is_in_place_of_a_small_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    assert require_small_files(tmp_path) == ["generation_config.json"]
    os.mkfifo(tmp_path / name)
    with pytest.raises(WeightsError, match=f"`.*{name}` is a pipe, not a file"):
        require_small_files(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("none")
    with pytest.raises(WeightsError, match=f"`.*{name}` is a broken link, not a file"):
        require_small_files(tmp_path)
