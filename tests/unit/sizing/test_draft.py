"""Memory of a draft model: what loading it takes, and the published sizes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_reduce

from kimi_mlx.model.config import read_json
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.draft_config import load_draft_config, parse_draft_config
from kimi_mlx.model.draft_quantization import EIGHT_BITS
from kimi_mlx.model.weight import Embedding, Weight
from kimi_mlx.sizing.draft import (
    captured_bytes_per_token,
    draft_cache_bytes_per_token,
    draft_pass_bytes,
    draft_weight_bytes,
)
from kimi_mlx.weights.draft import load_draft
from tests.drafts import PUBLISHED, draft_config, quantize_draft, write_draft
from tests.fakes import KIMI_MINI


def test_published_draft_models_take_3_7_gb_without_embedding() -> None:
    config = parse_draft_config(PUBLISHED)
    assert draft_weight_bytes(config, quantization=None) == 3_682_441_216
    assert draft_weight_bytes(config) == 1_956_345_856
    assert draft_weight_bytes(config, has_embedding=True) - draft_weight_bytes(config) == 2 * 163840 * 7168
    assert draft_weight_bytes(config) - draft_pass_bytes(config) == 3 * 7168 * 7168 * 17 // 16  # fc
    assert draft_cache_bytes_per_token(config) == 2 * (512 + 64)
    assert captured_bytes_per_token(config) == 2 * 3 * 7168


def _embedding() -> Embedding:
    return Embedding(Weight(mx.zeros((1792, 128))))


@pytest.mark.parametrize("has_embedding", [False, True])
@pytest.mark.parametrize(("is_quantized", "quantization"), [(False, None), (True, None), (False, EIGHT_BITS)])
def test_weights_take_as_many_bytes_as_predicted(
    tmp_path: Path, has_embedding: bool, is_quantized: bool, quantization: Quantization | None
) -> None:
    config = draft_config(read_json(KIMI_MINI / "config.json"), draft_vocab_size=512)
    folder = write_draft(tmp_path / "draft", config, has_embedding=has_embedding)
    if is_quantized:
        folder = quantize_draft(folder, tmp_path / "quantized", bits=4, group_size=32)
    parsed = load_draft_config(folder)
    draft = load_draft(folder, parsed, mx.float32, (0, 2, 3), None if has_embedding else _embedding(), quantization)
    total = tree_reduce(lambda total, array: total + array.nbytes, draft.parameters(), 0)
    assert total == draft_weight_bytes(parsed, has_embedding, 4, quantization)
