"""Conversion to MLX's affine layout: the result in mlx-lm and here, what is kept, resuming, memory, protection."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import KimiMlxError, UsageError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.weights import convert as converter
from kimi_mlx.weights import convert_folder, requantize
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert import ConversionResult, convert
from kimi_mlx.weights.convert_folder import RECORD_NAME
from kimi_mlx.weights.convert_options import BFLOAT16_BITS, ConvertOptions
from kimi_mlx.weights.convert_report import list_notes
from kimi_mlx.weights.fp8 import decode
from kimi_mlx.weights.index import INDEX_NAME, read_index
from tests.checkpoints import FORMATS, load_golden, quantize_checkpoint, write_checkpoint
from tests.parity.test_logits import relative_error
from tests.processes import start

ROOT = Path(__file__).resolve().parents[3]
IDS = np.arange(40).reshape(2, 20) * 7 % 61
GROUPS_OF_32 = ConvertOptions(bits=4, group_size=32)


def run(source: Path, folder: Path, options: ConvertOptions | None = None) -> ConversionResult:
    return convert(open_conversion(source, options or ConvertOptions()), folder)


def logits_here(folder: Path) -> np.ndarray:
    return np.asarray(load_model(folder, load_config(folder), mx.float32)(mx.array(IDS)))


def logits_of_mlx_lm(folder: Path) -> np.ndarray:
    from mlx_lm.utils import load_model as load_mlx_lm

    mx.disable_compile()  # its C++ compiler takes longer than everything else
    model = load_mlx_lm(folder)[0]
    model.set_dtype(mx.float32)
    return np.asarray(model(mx.array(IDS)))


def tensors_of(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        tensors |= loaded
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published formats, and MLX's in its variants."""
    folder = tmp_path_factory.mktemp("sources")
    golden = load_golden("k2")
    plain = write_checkpoint(folder / "float32", golden.config, golden.seed)
    half = write_checkpoint(folder / "bfloat16", golden.config, golden.seed, "bfloat16")
    path = "model.layers.1.mlp.switch_mlp.up_proj"
    options: dict[str, Any] = {"bits": 4, "group_size": 32}
    mixed = {path: {"bits": 6, "group_size": 32}, "lm_head": False}
    return {
        **{name: FORMATS / name for name in ("bf16", "fp8", "int4", "int4-k2.5")},
        "float32": plain,
        "affine": quantize_checkpoint(half, folder / "affine", **options, dtype="bfloat16"),
        "affine, one by one": quantize_checkpoint(half, folder / "one", **options, stack_experts=False),
        "affine, mixed": quantize_checkpoint(half, folder / "mixed", **options, overrides=mixed),
        "affine, whole kv_b": quantize_checkpoint(half, folder / "whole", **options, split_kv_b=False),
    }


QUICK = [
    ("bf16", GROUPS_OF_32),
    ("fp8", ConvertOptions()),
    ("int4", ConvertOptions()),
    ("int4-k2.5", ConvertOptions()),
    ("int4-k2.5", ConvertOptions(bits=3)),
    ("int4", ConvertOptions(expert_bits=4)),
    ("fp8", ConvertOptions(bits=BFLOAT16_BITS, expert_bits=2, group_size=32)),
    ("affine, mixed", ConvertOptions()),
]
WIDE = [
    (source, ConvertOptions(bits, expert_bits, group_size))
    for source in ("bf16", "fp8", "int4", "int4-k2.5", "affine", "affine, mixed", "affine, whole kv_b", "float32")
    for bits, expert_bits in [(2, None), (5, 3), (6, 8), (BFLOAT16_BITS, None), (None, 6), (8, BFLOAT16_BITS)]
    for group_size in (None, 32, 64)
    if not (bits == BFLOAT16_BITS and group_size)
]


@pytest.mark.parametrize(
    ("name", "options"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.sweep) for case in WIDE)]
)
def test_mlx_lm_and_we_compute_the_same(
    name: str, options: ConvertOptions, sources: dict[str, Path], tmp_path: Path
) -> None:
    run(sources[name], tmp_path / "out", options)
    assert relative_error(mx.array(logits_here(tmp_path / "out")), logits_of_mlx_lm(tmp_path / "out")) < 2e-5


LOSSLESS = ["int4", "int4-k2.5", "affine", "affine, one by one", "affine, mixed", "affine, whole kv_b"]


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_is_quantized_is_kept(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources[name], tmp_path / "out")
    assert relative_error(mx.array(logits_here(tmp_path / "out")), logits_here(sources[name])) < 1e-5


@pytest.mark.parametrize("options", [ConvertOptions(), GROUPS_OF_32, ConvertOptions(expert_bits=4, group_size=32)])
def test_packed_integers_are_kept_bit_for_bit(
    options: ConvertOptions, sources: dict[str, Path], tmp_path: Path
) -> None:
    run(sources["int4-k2.5"], tmp_path / "out", options)
    before, after = tensors_of(sources["int4-k2.5"]), tensors_of(tmp_path / "out")
    prefix = "language_model.model.layers.1.mlp."
    for name in ("gate_proj", "up_proj", "down_proj"):
        experts = [f"{prefix}experts.{number}.{name}" for number in range(8)]
        packed = mx.stack([before[f"{path}.weight_packed"].view(mx.uint32) for path in experts])
        scales = mx.stack([before[f"{path}.weight_scale"] for path in experts])
        stack = f"{prefix}switch_mlp.{name}"
        assert mx.array_equal(after[f"{stack}.weight"], packed)
        assert mx.array_equal(after[f"{stack}.scales"], scales)
        assert after[f"{stack}.scales"].dtype == mx.bfloat16
        assert mx.array_equal(after[f"{stack}.biases"], -8 * scales)


def test_copying_mlx_affine_changes_no_tensor(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["affine, mixed"], tmp_path / "out")
    before, after = tensors_of(sources["affine, mixed"]), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_floats_are_quantized_as_mlx_lm_does(bits: int, tmp_path: Path) -> None:
    golden = load_golden("k2")
    source = write_checkpoint(tmp_path / "source", golden.config, golden.seed, "bfloat16")
    peer = quantize_checkpoint(source, tmp_path / "peer", bits, 32, dtype="bfloat16")
    run(source, tmp_path / "out", ConvertOptions(bits=bits, group_size=32))
    expected, found = tensors_of(peer), tensors_of(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not mx.array_equal(expected[name], found[name])] == []


def test_pieces_make_no_difference(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fp8", "affine"):
        run(sources[name], tmp_path / name / "whole", ConvertOptions(bits=3, group_size=32))
    monkeypatch.setattr(requantize, "CHUNK_VALUES", 5000)
    for name in ("fp8", "affine"):
        run(sources[name], tmp_path / name / "pieces", ConvertOptions(bits=3, group_size=32))
        assert contents(tmp_path / name / "whole") == contents(tmp_path / name / "pieces")


def test_fp8_becomes_its_values(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["fp8"], tmp_path / "out", ConvertOptions(bits=BFLOAT16_BITS))
    before, after = tensors_of(sources["fp8"]), tensors_of(tmp_path / "out")
    for path in ("model.layers.1.self_attn.kv_a_proj_with_mqa", "model.layers.1.mlp.shared_experts.down_proj"):
        scales = np.array(before[f"{path}.weight_scale_inv"])
        values = decode(np.array(before[f"{path}.weight"]), scales, (128, 128))
        assert mx.array_equal(after[f"{path}.weight"], mx.array(values).astype(mx.bfloat16))
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_router_and_norms_stay_float(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["bf16"], tmp_path / "out", GROUPS_OF_32)
    tensors = tensors_of(tmp_path / "out")
    types = {
        "mlp.gate.weight": mx.bfloat16,
        "mlp.gate.e_score_correction_bias": mx.float32,
        "input_layernorm.weight": mx.bfloat16,
        "mlp.switch_mlp.up_proj.weight": mx.uint32,
        "mlp.switch_mlp.up_proj.scales": mx.bfloat16,
    }
    assert {name: tensors[f"model.layers.1.{name}"].dtype for name in types} == types


def test_floats_have_the_type_of_the_configuration(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["float32"], tmp_path / "out", GROUPS_OF_32)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {mx.float32, mx.uint32}
    run(sources["float32"], tmp_path / "half", ConvertOptions(bits=BFLOAT16_BITS, expert_bits=4))
    tensors = tensors_of(tmp_path / "half")
    assert tensors["model.norm.weight"].dtype == tensors["lm_head.weight"].dtype == mx.bfloat16
    assert load_config(tmp_path / "half").dtype == "bfloat16"


def test_a_whole_kv_b_proj_is_kept_whole_or_split_from_floats(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["affine, whole kv_b"]
    run(source, tmp_path / "kept")
    run(source, tmp_path / "anew", ConvertOptions(bits=8))
    kept, anew = tensors_of(tmp_path / "kept"), tensors_of(tmp_path / "anew")
    path = "model.layers.1.self_attn."
    assert mx.array_equal(kept[f"{path}kv_b_proj.weight"], tensors_of(source)[f"{path}kv_b_proj.weight"])
    assert f"{path}embed_q.weight" not in kept
    assert {f"{path}embed_q.scales", f"{path}unembed_out.scales"} <= anew.keys()
    assert f"{path}kv_b_proj.weight" not in anew
    assert relative_error(mx.array(logits_here(tmp_path / "anew")), logits_here(source)) < 0.1


def test_mlx_lm_finds_the_bits_of_a_whole_kv_b_proj(tmp_path: Path) -> None:
    golden = load_golden("k2")
    source = write_checkpoint(tmp_path / "source", golden.config, golden.seed)
    path = "model.layers.1.self_attn."
    own: dict[str, dict[str, int] | bool] = {f"{path}kv_b_proj": {"bits": 8, "group_size": 32}}
    affine = quantize_checkpoint(source, tmp_path / "affine", 4, 32, overrides=own, split_kv_b=False)
    run(affine, tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    names = [f"{path}{name}" for name in ("kv_b_proj", "embed_q", "unembed_out")]
    assert [block[name] for name in names] == [{"bits": 8, "group_size": 32}] * 3
    assert relative_error(mx.array(logits_of_mlx_lm(tmp_path / "out")), logits_here(affine)) < 0.2


def test_the_configuration_says_what_holds(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["int4-k2.5"], tmp_path / "out", ConvertOptions(expert_bits=4))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization"] == raw["quantization_config"]
    assert "quantization_config" not in raw["text_config"]
    assert raw["model_type"] == "kimi_k25"
    prefixes = {path.split(".")[0] for path in raw["quantization"]} - {"group_size", "bits", "mode"}
    assert prefixes == {"language_model"}
    config = load_config(tmp_path / "out")
    assert config.compression is None
    assert config.quantization_of("model.layers.1.mlp.switch_mlp.up_proj") == Quantization(4, 32)
    assert config.quantization_of("model.layers.1.self_attn.o_proj") == Quantization(8, 32)
    assert not any("vision" in name or "mm_projector" in name for name in tensors_of(tmp_path / "out"))


def test_keys_that_no_longer_hold_go(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["int4-k2.5"], tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    raw |= {"auto_map": {"AutoConfig": "code.Config"}, "vision_config": {}, "torch_dtype": "float16"}
    raw["text_config"]["num_nextn_predict_layers"] = 1
    (source / "config.json").write_text(json.dumps(raw))
    run(source, tmp_path / "out")
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "vision_config"} & new.keys()
    assert new["text_config"]["num_nextn_predict_layers"] == 0
    assert new["torch_dtype"] == new["text_config"]["torch_dtype"] == "bfloat16"


def test_columns_that_do_not_divide_stay_float(sources: dict[str, Path], tmp_path: Path) -> None:
    conversion = open_conversion(sources["bf16"], ConvertOptions(bits=4, group_size=64))
    indivisible = [weight for weight in conversion.plan.weights if weight.is_indivisible]
    assert indivisible
    assert all(weight.shape[-1] % 64 and weight.plan.quantization is None for weight in indivisible)
    assert any(f"{len(indivisible)} matrices stay bfloat16" in note for note in list_notes(conversion.plan))
    convert(conversion, tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert sorted(path for path, value in block.items() if value is False) == sorted(
        weight.path for weight in indivisible
    )


def test_notes_name_requantized_matrices(sources: dict[str, Path]) -> None:
    def notes(options: ConvertOptions) -> str:
        return " ".join(list_notes(open_conversion(sources["int4"], options).plan))

    assert "routed experts" in notes(ConvertOptions(expert_bits=3))
    assert "re-quantized" not in notes(ConvertOptions(expert_bits=4))


@pytest.mark.parametrize(
    ("name", "options", "group_size"),
    [
        ("int4", ConvertOptions(bits=4), 32),
        ("int4", ConvertOptions(bits=4, group_size=64), 64),
        ("bf16", ConvertOptions(), 64),
        ("bf16", ConvertOptions(group_size=32), 32),
        ("fp8", ConvertOptions(expert_bits=2), 64),
    ],
)
def test_the_default_group_is_that_of_the_experts(
    name: str, options: ConvertOptions, group_size: int, sources: dict[str, Path]
) -> None:
    quantizations = {weight.plan.quantization for weight in open_conversion(sources[name], options).plan.weights}
    assert {quantization.group_size for quantization in quantizations if quantization} == {group_size}


@pytest.mark.parametrize("options", [ConvertOptions(group_size=64), ConvertOptions(bits=BFLOAT16_BITS, group_size=64)])
def test_options_without_effect_are_refused(options: ConvertOptions, sources: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="--group-size 64"):
        open_conversion(sources["int4"], options)


def test_index_and_sizes_are_true(sources: dict[str, Path], tmp_path: Path) -> None:
    conversion = open_conversion(sources["fp8"], GROUPS_OF_32)
    result = convert(conversion, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    tensors = tensors_of(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [file.name for file in files] == [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert result.size_bytes == sum(file.stat().st_size for file in files)
    assert result.files == 3
    table = read_index(tmp_path / "out")
    assert all(info.start % 8 == 0 or info.dtype not in ("U32", "F32") for info in table.values())


def test_small_files_come_along_and_code_does_not(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["fp8"], tmp_path / "source")
    kept = {"tokenizer_config.json", "tiktoken.model", "chat_template.jinja", "generation_config.json", "LICENSE"}
    for name in {*kept, "tokenization_kimi.py", "tokenizer.py", "README.md", ".hidden.json"}:
        (source / name).write_text(name)
    run(source, tmp_path / "out")
    names = contents(tmp_path / "out").keys()
    assert {name for name in names if not name.startswith("model")} == {*kept, "config.json"}
    assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"


# --- stopping and going on ---


class Stopped(BaseException):
    """In place of a kill."""


def stop_at(call: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The function, until its call of this number, which raises."""
    calls = itertools.count()

    def stopping(*arguments: Any) -> Any:
        if next(calls) == call:
            raise error
        return function(*arguments)

    return stopping


@pytest.fixture(scope="module")
def finished(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes out if nothing goes wrong."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(sources["fp8"], folder, GROUPS_OF_32)
    return contents(folder)


@pytest.mark.parametrize("step", ["_write_chunk", "rename_durably", "write_atomically"])
@pytest.mark.parametrize("call", [0, 1, 2, 30])
def test_going_on_ends_with_the_same_bytes(
    step: str,
    call: int,
    sources: dict[str, Path],
    finished: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping = stop_at(call, getattr(converter, step), Stopped())
        for module in (converter, convert_folder):
            if hasattr(module, step):
                patch.setattr(module, step, stopping)
        try:
            run(sources["fp8"], folder, GROUPS_OF_32)
        except Stopped:
            assert not (folder / "config.json").exists()
    if not (folder / "config.json").exists():
        before = {path: path.stat() for path in folder.glob("model-*.safetensors")}
        assert run(sources["fp8"], folder, GROUPS_OF_32).files_before == len(before)
        assert all(path.stat().st_mtime_ns == status.st_mtime_ns for path, status in before.items())
        assert all(path.stat().st_ino == status.st_ino for path, status in before.items())
    assert contents(folder) == finished


SLOW_PROCESS = """
import sys, time
from pathlib import Path
from kimi_mlx.weights import convert as converter
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert_options import ConvertOptions

convert_chunk = converter.convert_chunk
def slowly(*arguments):
    time.sleep(0.01)
    return convert_chunk(*arguments)
converter.convert_chunk = slowly
conversion = open_conversion(Path(sys.argv[1]), ConvertOptions(bits=4, group_size=32))
converter.convert(conversion, Path(sys.argv[2]))
"""


def test_a_killed_process_goes_on(sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = start([sys.executable, "-c", SLOW_PROCESS, str(sources["fp8"]), str(folder)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (folder / "model-00002-of-00003.safetensors.part").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert {RECORD_NAME, "model-00001-of-00003.safetensors"} <= contents(folder).keys()
    assert not {INDEX_NAME, "config.json"} & contents(folder).keys()
    with pytest.raises(KimiMlxError):
        load_config(folder)
    assert run(sources["fp8"], folder, GROUPS_OF_32).files_before == 1
    assert contents(folder) == finished


def test_what_a_killed_process_left_is_cleaned_up(
    sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / f"{RECORD_NAME}.4711.part").write_text("{")
    run(sources["fp8"], tmp_path, GROUPS_OF_32)
    assert contents(tmp_path) == finished


def test_a_file_that_was_cut_is_written_again(
    sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(converter, "_finish", stop_at(0, lambda: None, Stopped()))
        with pytest.raises(Stopped):
            run(sources["fp8"], folder, GROUPS_OF_32)
    os.truncate(folder / "model-00002-of-00003.safetensors", 1000)
    assert run(sources["fp8"], folder, GROUPS_OF_32).files_before == 2
    assert contents(folder) == finished


def unfinished(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    with monkeypatch.context() as patch:
        patch.setattr(converter, "rename_durably", stop_at(1, converter.rename_durably, Stopped()))
        with pytest.raises(Stopped):
            run(source, folder, GROUPS_OF_32)
    return contents(folder)


def test_other_options_or_another_source_are_refused(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    before = unfinished(sources["fp8"], folder, monkeypatch)
    with pytest.raises(
        UsageError, match=r"fp8.* with bits 4, group_size 32; this command converts .*fp8.* with bits 3"
    ):
        run(sources["fp8"], folder, ConvertOptions(bits=3))
    with pytest.raises(UsageError, match=r"fp8.*; this command converts .*bf16"):
        run(sources["bf16"], folder, GROUPS_OF_32)
    assert contents(folder) == before


def test_a_source_that_has_changed_is_refused(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(sources["fp8"], tmp_path / "source")
    unfinished(source, tmp_path / "out", monkeypatch)
    os.utime(source / "model-00001-of-000002.safetensors")
    with pytest.raises(UsageError, match="unfinished conversion"):
        run(source, tmp_path / "out", GROUPS_OF_32)


@pytest.mark.parametrize(
    ("name", "message"), [("config.json", "already contains a model"), ("photo.jpg", "it has `photo.jpg`")]
)
def test_other_folders_are_left_alone(name: str, message: str, sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=message):
        run(sources["fp8"], tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_finished_model_and_a_file_are_left_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["fp8"], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match="already contains a model"):
        run(sources["fp8"], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    with pytest.raises(UsageError, match="Not a directory"):
        run(sources["fp8"], tmp_path / "out" / "config.json")


def test_a_broken_record_is_an_error(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        run(sources["fp8"], tmp_path)


def test_two_processes_do_not_share_a_folder(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(sources["fp8"], tmp_path / "out", monkeypatch)
    with (tmp_path / "out" / RECORD_NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(WeightsError, match="another process"):
            run(sources["fp8"], tmp_path / "out", GROUPS_OF_32)


# --- disk and memory ---


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_is_told_before(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = open_conversion(sources["fp8"], GROUPS_OF_32).size_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size - 1))
    with pytest.raises(WeightsError, match=r"needs \d+\.\d kB .*has \d+\.\d kB free"):
        run(sources["fp8"], tmp_path / "new" / "out", GROUPS_OF_32)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size))
    run(sources["fp8"], tmp_path / "new" / "out", GROUPS_OF_32)


def test_what_is_done_needs_no_space(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished(sources["fp8"], tmp_path / "out", monkeypatch)
    size = open_conversion(sources["fp8"], GROUPS_OF_32).size_bytes
    done = (tmp_path / "out" / "model-00001-of-00003.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size - done))
    assert run(sources["fp8"], tmp_path / "out", GROUPS_OF_32).files_before == 1


def test_a_full_disk_keeps_what_is_done(
    sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(converter, "_write_chunk", stop_at(30, converter._write_chunk, full))
        with pytest.raises(WeightsError, match="the disk is full: the rest needs") as caught:
            run(sources["fp8"], folder, GROUPS_OF_32)
    assert "same command" in (caught.value.hint or "")
    assert contents(folder).keys() == {RECORD_NAME, "model-00001-of-00003.safetensors"}
    run(sources["fp8"], folder, GROUPS_OF_32)
    assert contents(folder) == finished


def test_a_disk_that_fills_up(
    sources: dict[str, Path], finished: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(converter, "check_space", lambda *_: None)  # another program has taken it
            with pytest.raises(WeightsError, match="the disk is full"):
                run(sources["fp8"], disk / "out", GROUPS_OF_32)
        assert contents(disk / "out").keys() == {RECORD_NAME, "model-00001-of-00003.safetensors"}
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        run(sources["fp8"], disk / "out", GROUPS_OF_32)
        assert contents(disk / "out") == finished
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("options", [ConvertOptions(), ConvertOptions(bits=4)], ids=["kept", "quantized"])
def test_memory_is_that_of_a_few_pieces(
    options: ConvertOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden("k2")
    wide = {"num_hidden_layers": 2, "n_routed_experts": 96, "moe_intermediate_size": 192, "vocab_size": 8192}
    source = write_checkpoint(tmp_path / "source", {**golden.config, **wide}, 1, "bfloat16")
    if options.bits is None:
        source = quantize_checkpoint(source, tmp_path / "affine", 4, 32, stack_experts=False, dtype="bfloat16")
    piece = 192 * golden.config["hidden_size"]
    monkeypatch.setattr(requantize, "CHUNK_VALUES", piece)
    conversion = open_conversion(source, options)
    layer = conversion.plan.files[1].layout().size_bytes
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    try:
        convert(conversion, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before
    finally:
        tracemalloc.stop()
    assert peak < 20 * piece * 4 + 500_000
    assert peak < layer
