"""Headers of safetensors files: a damaged or malicious one raises a WeightsError that names the file and the tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_mlx.errors import WeightsError
from kimi_mlx.weights.header import MAX_HEADER_BYTES, TensorInfo, parse_header, read_header

VALID = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DATA = bytes(range(48))


def write(folder: Path, header: dict[str, Any] | str, data: bytes = DATA) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def test_a_valid_header_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, {"__metadata__": {"format": "mlx"}, "a": VALID})
    assert read_header(file) == {"a": TensorInfo("F32", (2, 2), file, file.stat().st_size - len(DATA))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_offsets": [-16, 0]}, "non-negative integers"),
        ({"data_offsets": [16, 0]}, "starts at byte 16, after its end at byte 0"),
        ({"data_offsets": [0, 16.0]}, "non-negative integers"),
        ({"data_offsets": [0, float("inf")]}, "non-negative integers"),
        ({"data_offsets": [0]}, "has 1 data_offsets, not 2"),
        ({"data_offsets": "01"}, "non-negative integers"),
        ({"data_offsets": [0, 2**62]}, "truncated"),
        ({"data_offsets": [0, 2**70]}, "non-negative integers"),
        ({"shape": [-2, -2]}, "non-negative integers"),
        ({"shape": [True, 4]}, "non-negative integers"),
        ({"shape": None}, "non-negative integers"),
        ({"shape": [1] * 10_000}, "non-negative integers"),
        ({"shape": [2**62, 2**62]}, "has 16 bytes; its shape"),
        ({"shape": [2, 3]}, r"has 16 bytes; its shape \(2, 3\) in F32 needs 24"),
        ({"dtype": 4}, "has dtype 4, which is not a type"),
        ({"dtype": "F32\u001b[2J"}, "which is not a type"),
        ({"dtype": "BF16"}, r"its shape \(2, 2\) in BF16 needs 8"),
    ],
)
def test_an_invalid_tensor_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path, {"a": {**VALID, **change}})
    with pytest.raises(WeightsError, match=message) as caught:
        read_header(file)
    assert str(file) in caught.value.message
    assert "tensor `a`" in caught.value.message


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {}, "a": {}}', "has `a` twice"),
        ('{"a": {"dtype": "F32", "dtype": "F16"}}', "tensor `a` in .* has `dtype` twice"),
        ('{"a\\ud800": {}}', "invalid name"),
        ('{"a\\u001b[2J": {}}', "invalid name"),
        (json.dumps({"a" * 10_000: {}}), "invalid name"),
        ("[" * 200_000, "cannot be read"),
        ('{"a":' * 200_000, "cannot be read"),
        ('{"a": {"shape": [' + "9" * 5000 + "]}}", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"a": []}', "tensor `a` in .* is not a JSON object"),
    ],
)
def test_an_invalid_header_is_refused(tmp_path: Path, header: str, message: str) -> None:
    file = write(tmp_path, header)
    with pytest.raises(WeightsError, match=message) as caught:
        read_header(file)
    assert str(file) in caught.value.message
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_of_impossible_length_is_not_read(length: int) -> None:
    def read(start: int, stop: int) -> bytes:
        assert (start, stop) == (0, 8)
        return length.to_bytes(8, "little")

    with pytest.raises(WeightsError, match=f"its header has {length} bytes"):
        parse_header(Path("model.safetensors"), 2**40, read)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n")
    with pytest.raises(WeightsError, match=r"model\.safetensors` is a pointer of Git LFS") as caught:
        read_header(file)
    assert "git lfs pull" in str(caught.value.hint)


@pytest.mark.parametrize(("first", "second"), [([0, 16], [0, 16]), ([0, 16], [12, 28]), ([4, 20], [0, 16])])
def test_tensors_that_overlap_are_refused(tmp_path: Path, first: list[int], second: list[int]) -> None:
    file = write(tmp_path, {"a": {**VALID, "data_offsets": first}, "b": {**VALID, "data_offsets": second}})
    with pytest.raises(WeightsError, match=r"tensor `[ab]` in .* starts at byte \d+, before tensor `[ab]` ends"):
        read_header(file)


def test_unaligned_and_empty_tensors_are_read(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [7, 7]}
    file = write(tmp_path, {"a": {**VALID, "data_offsets": [3, 19]}, "empty": empty})
    info = read_header(file)["a"]
    data = np.memmap(file, np.uint8, "r")[info.start : info.start + info.size_bytes].view(np.float32)
    np.testing.assert_array_equal(data, np.frombuffer(DATA[3:19], np.float32))


NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-1, 50) | st.sampled_from([0, 4, 16, 48, 2**63, 2**64])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
SIZES = st.lists(NUMBERS, max_size=4)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "I64", "F4", ""]) | VALUES,
        "shape": SIZES | VALUES,
        "data_offsets": st.tuples(NUMBERS, NUMBERS) | SIZES | VALUES,
    },
)
HEADERS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "__metadata__"]) | st.text(max_size=5), TENSORS | VALUES))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HEADERS, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3))
def test_any_header_is_refused_or_describes_disjoint_ranges_of_the_file(
    tmp_path: Path, header: list[tuple[str, Any]], flips: list[tuple[int, int]]
) -> None:
    text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(item)}" for name, item in header) + "}"
    file = write(tmp_path, text)
    data = bytearray(file.read_bytes())
    for place, value in flips:
        if 8 <= place < len(data):
            data[place] = value
    file.write_bytes(data)
    check_table(file)


def check_table(file: Path) -> None:
    """Check that a file is refused with its name, or that its tensors are disjoint ranges of it."""
    table: dict[str, TensorInfo] = {}
    message = str(file)
    try:
        table = read_header(file)
    except WeightsError as error:
        message = error.message
    assert str(file) in message
    assert message.isprintable()
    size = file.stat().st_size
    counts = np.zeros(size, np.uint8)
    for info in table.values():
        assert 8 <= info.start <= info.start + info.size_bytes <= size
        counts[info.start : info.start + info.size_bytes] += 1
    assert counts.max() <= 1


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
def test_any_damage_to_a_file_is_refused_or_harmless(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    names = {"a": [0, 16], "b": [16, 32], "c": [32, 48]}
    file = write(tmp_path, {name: {**VALID, "data_offsets": offsets} for name, offsets in names.items()})
    data = bytearray(file.read_bytes())
    for place, change in changes:
        data[place : place + len(change)] = change
    file.write_bytes(data[: len(data)])
    check_table(file)
