"""Compiled functions against the plain ones, and the router's choice of experts against the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from kimi_mlx.engine.token_mask import masked
from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import RandomWeights, model_config
from kimi_mlx.model.moe import Router, router_scores, swiglu
from kimi_mlx.model.vision import gelu_exact, gelu_tanh

K2_EXPERTS = 384
TOKENS = 512

LIMITS = {mx.float32: 1e-5, mx.bfloat16: 2e-2}


def check(context: Context) -> None:
    """Call each function on the device in both forms, with several shapes: a compiled function is traced once."""
    for dtype, limit in LIMITS.items():
        short = str(dtype).removeprefix("mlx.core.")
        for rows in (1, 9):
            gate, up = (mx.random.normal((1, rows, 192), key=mx.random.key(seed)).astype(dtype) for seed in (1, 2))
            _compare(context, f"swiglu {short} {rows}", swiglu, (gate, up), limit)
            _compare(context, f"gelu_tanh {short} {rows}", gelu_tanh, (gate,), limit)
            _compare(context, f"gelu_exact {short} {rows}", gelu_exact, (gate,), limit)
            mask = mx.array(np.random.default_rng(3).integers(0, 2**32, (rows, 6), np.uint32))
            _compare(context, f"masked {short} {rows}", masked, (gate[0], mask), 0.0)
    for rows in (1, 9):
        logits = mx.random.normal((1, rows, K2_EXPERTS), key=mx.random.key(4))
        bias = 0.1 * mx.random.normal((K2_EXPERTS,), key=mx.random.key(5))
        _compare(context, f"router_scores {rows}", router_scores, (logits, bias), LIMITS[mx.float32])
    context.progress("router")
    _compare_routers(context)


def _compare(
    context: Context, name: str, function: Callable[..., Any], args: tuple[mx.array, ...], limit: float
) -> None:
    plain = cast("Callable[..., Any]", getattr(function, "__wrapped__"))  # noqa: B009 # set by functools.wraps
    with context.on_device():
        outputs, expected = function(*args), plain(*args)
        mx.eval(outputs, expected)
    outputs, expected = (value if isinstance(value, tuple) else (value,) for value in (outputs, expected))
    for actual, reference in zip(outputs, expected, strict=True):
        # forbidden tokens, and no others, have logits of -inf
        is_finite = np.isfinite(np.array(reference.astype(mx.float32)))
        same = np.isfinite(np.array(actual.astype(mx.float32))) == is_finite
        context.require(f"{name}, infinities", bool(same.all()))
        context.compare(
            name, mx.where(mx.array(is_finite), actual, 0), mx.where(mx.array(is_finite), reference, 0), limit
        )


def _compare_routers(context: Context) -> None:
    """Compare the chosen experts and their weights for a router of K2's size, with states in bfloat16."""
    config = replace(model_config(context.sizes), n_routed_experts=K2_EXPERTS)
    weights = RandomWeights(replace(config, moe_intermediate_size=32))
    x = mx.random.normal((1, TOKENS, config.hidden_size), key=mx.random.key(6)).astype(mx.bfloat16)
    expected = Router(config, weights.layer(1, mx.float32))(x.astype(mx.float32))
    router = Router(config, weights.layer(1, mx.bfloat16))
    mx.eval(expected, router.parameters())
    with context.on_device():
        actual = router(x)
        mx.eval(actual)
    (ids, shares), (expected_ids, expected_shares) = (
        (np.array(ids), np.array(scores)) for ids, scores in (actual, expected)
    )
    differs = np.array([set(a) != set(b) for a, b in zip(ids[0], expected_ids[0], strict=True)])
    # Another order of summation changes who wins an exact tie. A router in bfloat16 differs for 2 to 6 % of the tokens.
    context.report("router, tokens with other experts", float(differs.mean()), 0.01)
    by_id = [
        np.take_along_axis(values, np.argsort(order, axis=-1), axis=-1)[0][~differs]
        for values, order in ((shares, ids), (expected_shares, expected_ids))
    ]
    context.compare("router, scores", mx.array(by_id[0]), mx.array(by_id[1]), LIMITS[mx.bfloat16])
    _compare_activations(context, router, *actual)


def _compare_activations(context: Context, router: Router, ids: mx.array, scores: mx.array) -> None:
    """Compare SwiGLU with the weights of the experts in one kernel against both after each other."""
    for rows in (1, 9):
        few, of_few = ids[:, :rows], scores[:, :rows]
        gate, up = (mx.random.normal((*few.shape, 1, 192), key=mx.random.key(seed)) for seed in (7, 8))
        with context.on_device():
            outputs = router.weighted_swiglu(gate, up, few, of_few)
            expected = swiglu(gate, up) * router.weigh(few, of_few)[..., None, None]
            mx.eval(outputs, expected)
        context.compare(f"weighted swiglu {rows}", outputs, expected, LIMITS[mx.bfloat16])
