"""Files of draft models: all published layouts load alike, and damaged ones are errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.errors import KimiMlxError, WeightsError
from kimi_mlx.model.config import load_config, read_json
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.draft_model import DraftModel
from kimi_mlx.model.draft_quantization import EIGHT_BITS, load_quantization
from kimi_mlx.runtime.load import load_draft_model
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import Config
from tests.drafts import draft_config, drafted_tokens, quantize_draft, write_draft
from tests.fakes import KIMI_MINI


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(KIMI_MINI, load_config(KIMI_MINI), mx.float32)


def config_of(**fields: object) -> Config:
    return draft_config(read_json(KIMI_MINI / "config.json"), **fields)


def outputs_of(draft: DraftModel) -> np.ndarray:
    """Return the logits of three rows."""
    mx.random.seed(3)
    width, size = len(draft.captured_layers) * draft.config.target_hidden_size, draft.config.hidden_size
    captured, embeddings = mx.random.normal((1, 3, width)), mx.random.normal((1, 3, size))
    dtype = draft.embed(mx.array([[0]])).dtype
    states = draft.fuse(captured.astype(dtype))
    layout = draft.layout([(0, 3)], [0, 1, 4])
    return np.array(
        draft.logits(draft(embeddings.astype(dtype), states, [draft.make_cache()], layout)).astype(mx.float32)
    )


@pytest.mark.parametrize(
    "layout",
    [
        {"layer": "layers.0."},
        {"layer": "model.layers.0.", "prefix": "model."},
        {"layer": "model.midlayer."},
        {"num_shards": 3},
        {"has_embedding": True},
    ],
    ids=str,
)
def test_all_published_layouts_load_alike(tmp_path: Path, model: Model, layout: dict[str, object]) -> None:
    expected = load_draft_model(write_draft(tmp_path / "midlayer", config_of()), model)
    draft = load_draft_model(write_draft(tmp_path / "other", config_of(), **layout), model)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(outputs_of(draft), outputs_of(expected))
    tokens = mx.array([[0, 5, 1791]])
    has_own = not np.array_equal(np.array(draft.embed(tokens)), np.array(model.embed_tokens(tokens)))
    assert has_own == ("has_embedding" in layout)


def test_bfloat16_files_load_in_both_types(tmp_path: Path, model: Model) -> None:
    exact = outputs_of(load_draft_model(write_draft(tmp_path / "float32", config_of()), model))
    folder = write_draft(tmp_path / "bfloat16", config_of(), dtype="bfloat16", has_embedding=True)
    for dtype, tolerance in ((mx.float32, 0.05), (mx.bfloat16, 0.1)):
        found = outputs_of(load_draft_model(folder, model, dtype))
        assert np.abs(found - exact).max() < tolerance * np.abs(exact).max()


def test_quantized_files_have_the_values_of_their_dequantized_matrices(tmp_path: Path, model: Model) -> None:
    config = config_of(draft_vocab_size=512)
    source = write_draft(tmp_path / "float", config, layer="layers.0.")
    floats = ("fc", "layers.0.self_attn.o_proj")
    folder = quantize_draft(source, tmp_path / "quantized", bits=8, group_size=32, floats=floats)
    stored = mx.load(str(folder / "model.safetensors"))
    assert isinstance(stored, dict)
    values = dict(stored)
    for name in stored:
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            parts = (values.pop(f"{path}.{part}") for part in ("weight", "scales", "biases"))
            values[f"{path}.weight"] = mx.dequantize(*parts, group_size=32, bits=8)
    assert len(values) < len(stored)
    mx.save_safetensors(str(source / "model.safetensors"), values)
    found, expected = (outputs_of(load_draft_model(each, model)) for each in (folder, source))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_float_matrices_are_quantized_on_a_gpu(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [load_quantization(kind) for kind in ("cpu", "metal", "cuda")] == [None, EIGHT_BITS, EIGHT_BITS]
    folder = write_draft(tmp_path, config_of(kv_lora_rank=96), has_embedding=True)  # 96 is no whole number of groups
    exact = load_draft_model(folder, model)
    monkeypatch.setattr("kimi_mlx.runtime.load.device_kind", lambda: "metal")
    quantized = load_draft_model(folder, model)
    assert quantized.lm_head.quantization == quantized.self_attn.o_proj.quantization == EIGHT_BITS
    assert quantized.self_attn.unembed_out.quantization is None
    assert quantized.embed_tokens.quantization is None
    found, expected = outputs_of(quantized), outputs_of(exact)
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_reduced_vocabulary_is_mapped_to_the_whole(tmp_path: Path, model: Model) -> None:
    config = config_of(draft_vocab_size=300)
    draft = load_draft_model(write_draft(tmp_path / "draft", config), model)
    tokens = drafted_tokens(config)
    assert draft.to_token_ids(mx.array([[0, 299]])).tolist() == [[tokens[0], tokens[299]]]
    logits = mx.random.normal((1, 2, 300))
    full = np.array(draft.scatter(logits))
    assert full.shape == (1, 2, 1792)
    np.testing.assert_array_equal(full[..., tokens], np.array(logits))
    assert np.isneginf(np.delete(full, tokens, axis=-1)).all()


def test_a_whole_vocabulary_needs_no_map(tmp_path: Path, model: Model) -> None:
    draft = load_draft_model(write_draft(tmp_path / "draft", config_of()), model)
    logits = mx.random.normal((1, 2, 1792))
    assert draft.scatter(logits) is logits


Tensors = dict[str, mx.array]
Damage = Callable[[Tensors], Tensors]


def without(name: str) -> Damage:
    return lambda tensors: {other: value for other, value in tensors.items() if other != name}


def replaced(name: str, value: Callable[[mx.array], mx.array]) -> Damage:
    return lambda tensors: tensors | {name: value(tensors[name])}


def added(name: str, value: mx.array) -> Damage:
    return lambda tensors: tensors | {name: value}


REDUCED = {"draft_vocab_size": 300}


@pytest.mark.parametrize(
    ("fields", "damage", "message"),
    [
        ({}, without("fc.weight"), "lacks the tensor `fc.weight`"),
        ({}, without("fc_norm.1.weight"), "lacks the tensor `fc_norm.1.weight`"),
        ({}, without("midlayer.self_attn.q_a_proj.weight"), "lacks the tensor `midlayer.self_attn.q_a_proj.weight`"),
        ({}, added("fc.bias", mx.zeros(128)), "has the tensor `fc.bias`"),
        ({}, added("midlayer.mlp.experts.0.up_proj.weight", mx.zeros((2, 2))), "which this model does not use"),
        ({}, added("layers.0.hidden_norm.weight", mx.ones(128)), "tensor `midlayer.hidden_norm.weight` twice"),
        (
            {},
            replaced("fc.weight", lambda x: x[:, :256]),
            "`fc.weight` in `.*` has shape \\(128, 256\\); .* \\(128, 384\\)",
        ),
        ({}, replaced("midlayer.self_attn.q_a_proj.weight", lambda x: x[:, :128]), "requires \\(96, 256\\)"),
        ({}, replaced("lm_head.weight", lambda x: x[:300]), "requires \\(1792, 128\\)"),
        ({}, replaced("norm.weight", lambda x: x.astype(mx.int32)), "`norm.weight` in `.*` has type I32"),
        (REDUCED, without("d2t"), "lacks the tensor `d2t`, which a vocabulary of 300 out of 1792"),
        (REDUCED, replaced("d2t", lambda x: x[:299]), "`d2t` in `.*` has type I64 and shape \\(299,\\); .* \\(300,\\)"),
        (REDUCED, replaced("d2t", lambda x: x.astype(mx.float32)), "`d2t` in `.*` has type F32"),
        (REDUCED, replaced("d2t", lambda x: x + 1), "maps an id to token 1792, outside the vocabulary of 1792"),
        (REDUCED, replaced("d2t", lambda x: x - 1), "maps an id to token -1, outside"),
        (REDUCED, replaced("d2t", lambda x: -mx.arange(300, dtype=mx.int64)), "maps 300 ids to 1 tokens"),
        (REDUCED, replaced("t2d", lambda x: ~x), "has 300 tokens, which are not the 1492 of `t2d`"),
        (REDUCED, replaced("t2d", lambda x: x[:-1]), "`t2d` in `.*` has type BOOL and shape \\(1791,\\)"),
    ],
)
def test_damaged_or_foreign_tensors_are_errors(
    tmp_path: Path, model: Model, fields: dict[str, object], damage: Damage, message: str
) -> None:
    folder = write_draft(tmp_path, config_of(**fields))
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), damage(tensors))
    with pytest.raises(WeightsError, match=message) as error:
        load_draft_model(folder, model)
    assert str(folder) in error.value.message
    assert error.value.hint


def test_missing_and_truncated_files_are_errors(tmp_path: Path, model: Model) -> None:
    folder = write_draft(tmp_path, config_of(), num_shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / sorted(set(index["weight_map"].values()))[1]
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(WeightsError, match="is truncated"):
        load_draft_model(folder, model)
    file.unlink()
    with pytest.raises(WeightsError, match=r"1 of 2 files of `.*` are missing"):
        load_draft_model(folder, model)


def test_a_model_is_not_a_draft_model(model: Model) -> None:
    with pytest.raises(KimiMlxError, match="is not that of a draft model"):
        load_draft_model(KIMI_MINI, model)


def test_a_hidden_size_of_its_own_needs_an_embedding_of_its_own(tmp_path: Path, model: Model) -> None:
    config = config_of(hidden_size=96, target_hidden_size=128)
    draft = load_draft_model(write_draft(tmp_path / "with", config, has_embedding=True), model)
    assert outputs_of(draft).shape == (1, 3, 1792)
    with pytest.raises(WeightsError, match="has no embedding of size 96, and that of the model has 128"):
        load_draft_model(write_draft(tmp_path / "without", config), model)
