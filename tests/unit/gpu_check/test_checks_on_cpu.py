"""Each check, with small sizes, on the CPU: passes as it is, and fails for a planted fault."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from kimi_mlx.gpu_check import (
    attention,
    batches,
    cache_blocks,
    compiled,
    draft,
    logits,
    rotations,
    streaming,
    timings,
    two_ranks,
    unload,
    vision,
)
from kimi_mlx.gpu_check.checks import CHECKS, FULL, SMALL, Comparison
from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import RandomWeights, model_config
from kimi_mlx.model import blockwise, moe, rope
from kimi_mlx.model import vision as tower
from kimi_mlx.model.attention import Attention
from kimi_mlx.model.vision_positions import rotate

QUICK = (rotations, compiled, draft, unload, vision)
LONG = (logits, attention, batches, cache_blocks, streaming, timings)

Messages = list[dict[str, Any]]


def run(check: Any) -> Messages:
    """Return what a check reports."""
    messages: Messages = []
    check.check(Context("cpu", SMALL, messages.append))
    return messages


def failures(messages: Messages) -> list[str]:
    """Return the names of the comparisons beyond their limits."""
    comparisons = [
        Comparison(message["name"], message["error"], message["limit"])
        for message in messages
        if message["kind"] == "comparison"
    ]
    assert comparisons
    return [comparison.name for comparison in comparisons if not comparison.is_ok]


def test_every_check_has_a_module() -> None:
    modules = {module.__name__.rpartition(".")[2] for module in (*QUICK, *LONG, two_ranks)}
    assert modules == {check.name for check in CHECKS}


@pytest.mark.parametrize("check", QUICK, ids=lambda module: module.__name__.rpartition(".")[2])
def test_quick_checks_pass_on_the_cpu(check: Any) -> None:
    assert failures(run(check)) == []


@pytest.mark.slow
@pytest.mark.parametrize("check", LONG[:-1], ids=lambda module: module.__name__.rpartition(".")[2])
def test_long_checks_pass_on_the_cpu(check: Any) -> None:
    assert failures(run(check)) == []


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_pass_on_the_cpu() -> None:
    assert failures(run(two_ranks)) == []


@pytest.mark.slow
def test_timings_measure_every_group() -> None:
    measurements = [message for message in run(timings) if message["kind"] == "measurement"]
    assert len({message["group"] for message in measurements}) == 7
    assert all(message["value"] >= 0 for message in measurements)


def test_a_kernel_that_skips_a_patch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vision.fused
    monkeypatch.setattr(vision, "fused", lambda q, k, v: whole(q, k[:, :, 1:], v[:, :, 1:]))
    failed = failures(run(vision))
    assert len(failed) == 6
    assert all(name.endswith("fused") for name in failed)


def test_a_tower_that_is_wrong_in_bfloat16_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "rotate", lambda x, turns: x if x.dtype == mx.bfloat16 else rotate(x, turns))
    assert failures(run(vision)) == ["features bfloat16"]


def test_a_wrong_rotation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rope.FastRotation._rotate

    def shifted(self: rope.FastRotation, x: mx.array) -> mx.array:
        return original(self, x * 1.0 if x.shape[-2] > 1 else x[..., ::-1])

    monkeypatch.setattr(rope.FastRotation, "_rotate", shifted)
    assert set(failures(run(rotations))) == {
        f"FastRotation {label} {dtype}" for label in ("one", "several") for dtype in ("float32", "bfloat16")
    }


def test_a_compiled_function_that_ignores_an_argument_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = moe.swiglu

    def wrong(gate: mx.array, up: mx.array) -> mx.array:
        return original(gate, gate)

    wrong.__wrapped__ = original.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(compiled, "swiglu", wrong)
    assert {name.partition(" ")[0] for name in failures(run(compiled))} == {"swiglu", "weighted"}


def test_a_router_in_bfloat16_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = moe.Router.__call__

    def rounded(self: moe.Router, x: mx.array) -> tuple[mx.array, mx.array]:
        if x.dtype == mx.bfloat16:
            self.weight = (self.weight * (1 + 2**-8 * mx.random.normal(self.weight.shape))).astype(mx.float32)
        return original(self, x)

    monkeypatch.setattr(moe.Router, "__call__", rounded)
    assert "router, tokens with other experts" in failures(run(compiled))


@pytest.mark.sweep
def test_a_wrong_mask_of_the_last_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attention.fused

    def shifted(self: Attention, q: mx.array, keys: mx.array, at_once: int) -> mx.array:
        out = original(self, q, keys, at_once)
        return out if at_once != 3 else mx.concatenate([out[:, :, :-1], out[:, :, -2:-1]], axis=2)

    monkeypatch.setattr(Attention, "fused", shifted)
    found = failures(run(attention))
    assert found
    assert all("fused, 3 heads" in name for name in found)


def test_full_sizes_are_those_of_k2() -> None:
    config = model_config(FULL)
    assert (config.hidden_size, config.num_attention_heads, config.moe_intermediate_size) == (7168, 64, 2048)
    assert (config.q_lora_rank, config.kv_lora_rank) == (1536, 512)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    assert config.num_experts_per_tok == 8
    assert [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)] == [False, True]
    assert attention.HEAD_SIZES == ((128, 64, 128), (32, 32, 32))
    assert {1, 7, 9, 64, 700} == set(FULL.prompts)
    assert max(FULL.prompts) > blockwise.KEY_BLOCK  # the cached part is more than one block


def test_a_random_model_has_the_same_values_in_every_dtype() -> None:
    weights = RandomWeights(model_config(SMALL))
    wide, narrow = weights.model(mx.float32), weights.model(mx.bfloat16)
    for a, b in zip(wide.layers, narrow.layers, strict=True):
        assert mx.array_equal(a["input_layernorm"], b["input_layernorm"].astype(mx.float32))
        scales = a.self_attn.o_proj["scales"], b.self_attn.o_proj["scales"]
        assert (scales[0].dtype, scales[1].dtype) == (mx.float32, mx.bfloat16)
        assert mx.array_equal(scales[0], scales[1].astype(mx.float32))
    assert isinstance(narrow.layers[1].mlp, moe.MoE)
    assert narrow.layers[1].mlp.gate["weight"].dtype == mx.float32


@pytest.mark.slow
def test_experts_in_another_order_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    read = streaming.CopyingReader.read

    def swapped(self: streaming.CopyingReader, layer: int, expert: int, *rest: Any) -> Any:
        return read(self, layer, 11 - expert, *rest)

    monkeypatch.setattr(streaming.CopyingReader, "read", swapped)
    assert len(failures(run(streaming))) > 4
