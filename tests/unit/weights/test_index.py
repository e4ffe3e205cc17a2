"""Headers and indices of checkpoints: broken or malicious ones raise a WeightsError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_mlx.errors import WeightsError
from kimi_mlx.weights.header import TensorInfo, read_header
from kimi_mlx.weights.index import INDEX_NAME, checkpoint_files, read_index

VALID = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(folder: Path, header: dict[str, Any] | str, data: bytes = bytes(32)) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def write_index(folder: Path, name: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))


def test_a_valid_header_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, {"__metadata__": {"format": "mlx"}, "a": VALID})
    info = read_index(tmp_path)["a"]
    assert info == TensorInfo("F32", (2, 2), file, file.stat().st_size - 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [-16, 0]}, "non-negative integers"),
        ({"data_offsets": [16, 0]}, "starts at byte 16, after its end at byte 0"),
        ({"data_offsets": [0, 16.0]}, "non-negative integers"),
        ({"data_offsets": [0, float("inf")]}, "non-negative integers"),
        ({"data_offsets": [0]}, "has 1 data_offsets, not 2"),
        ({"data_offsets": "01"}, "non-negative integers"),
        ({"data_offsets": [0, 2**62]}, "cut short"),
        ({"shape": [-2, -2]}, "non-negative integers"),
        ({"shape": [True, 4]}, "non-negative integers"),
        ({"shape": None}, "non-negative integers"),
        ({"shape": [2, 3]}, r"has 16 bytes; its shape \(2, 3\) in F32 needs 24"),
    ],
)
def test_an_invalid_header_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path, {"a": {**VALID, **change}})
    with pytest.raises(WeightsError, match=message) as caught:
        read_header(file)
    assert str(file) in caught.value.message


@pytest.mark.parametrize("header", ["[" * 200_000, '{"a":' * 200_000])
def test_a_deeply_nested_header_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        read_header(write(tmp_path, header))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["dtype", "shape", "data_offsets", None]), VALUES)
def test_any_header_is_accepted_or_refused(tmp_path: Path, field: str | None, value: Any) -> None:
    file = write(tmp_path, {"a": value if field is None else {**VALID, field: value}})
    try:
        info = read_header(file)["a"]
    except WeightsError:
        return
    assert 0 <= info.start <= file.stat().st_size


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
    write_index(tmp_path, name)
    with pytest.raises(WeightsError, match=r"index\.json` names the file .*, which is not a `\*\.safetensors` in"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("name", ["model-00001-of-000061.safetensors", "model 1+x_y.z.safetensors"])
def test_usual_file_names_are_accepted(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, name)
    (tmp_path / name).touch()
    assert checkpoint_files(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize(("method", "read"), [("open", read_index), ("is_file", checkpoint_files)])
def test_an_unreadable_file_has_a_hint_about_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, read: Any
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path, {"a": VALID})
    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(WeightsError, match="cannot be read: Permission denied") as caught:
        read(tmp_path)
    assert caught.value.hint == "check its permissions"
