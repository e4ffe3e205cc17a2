"""A random draft model at K2's widths against the CPU in float32, and the time of a draft token.

Letters: L rows, D hidden_size, C captured layers.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from kimi_mlx.gpu_check.checks import Sizes
from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import VOCAB_SIZE, model_config, random_tokens
from kimi_mlx.gpu_check.reference import plain_products
from kimi_mlx.model.draft_config import DraftConfig
from kimi_mlx.model.draft_model import DraftModel
from kimi_mlx.model.draft_quantization import EIGHT_BITS
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Weight
from kimi_mlx.weights.assemble import make_weight

LAYERS = (2, 30, 58)

NUM_FED_BACK = 3
"""Number of rows after those with captured states."""

FULL_VOCAB_SIZE = 163_840
"""Rows of the head of published draft models, which takes most of the time of a draft token."""

LIMITS = {mx.float32: 2e-3, mx.bfloat16: 0.1}
"""Largest relative error of the logits of a row."""


def check(context: Context) -> None:
    """Compare logits of rows with captured states, with a gap between them, and of rows that are fed back."""
    config = draft_config(context.sizes)
    shapes = entry_shapes(config)
    quantized = {name: _random_weight(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    length = context.sizes.prompts[-2]
    tokens = random_tokens(length + NUM_FED_BACK, config.vocab_size)
    captured = mx.random.normal((1, length, len(LAYERS) * config.hidden_size), key=mx.random.key(5))
    context.progress(f"{length} rows on the CPU")
    with plain_products():
        expected = _logits(_draft_model(config, quantized, mx.float32), tokens, captured)
    for dtype in context.dtypes:
        short = str(dtype).removeprefix("mlx.core.")
        context.progress(f"{length} rows in {short}")
        with context.on_device():
            draft = _draft_model(config, quantized, dtype)
            found = _logits(draft, tokens, captured.astype(dtype))
        for label, actual, reference in zip(("rows", "fed back"), found, expected, strict=True):
            context.compare(f"{label} {short}", actual, reference, LIMITS[dtype])
    context.progress("time of a draft token")
    with context.on_device():
        _measure(context, config, quantized)


def draft_config(sizes: Sizes) -> DraftConfig:
    """Return the configuration of a published draft model with a smaller vocabulary, or with small widths."""
    model = model_config(sizes)
    names = DraftConfig.__dataclass_fields__.keys() & model.__dataclass_fields__.keys()
    return DraftConfig(
        **{name: getattr(model, name) for name in names - {"quantization", "num_hidden_layers"}},
        num_hidden_layers=1,
        target_hidden_size=model.hidden_size,
        draft_vocab_size=VOCAB_SIZE,
        fc_norm=True,
        norm_output=True,
        layer_ids=LAYERS,
    )


def entry_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each entry of the draft model, unquantized."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q_dim, inner = config.q_lora_rank, config.intermediate_size
    assert q_dim is not None
    norms = ("norm", "input_layernorm", "hidden_norm", "post_attention_layernorm")
    return {
        **dict.fromkeys(norms, (hidden,)),
        **{f"fc_norm.{number}": (hidden,) for number in range(len(LAYERS))},
        "self_attn.q_a_layernorm": (q_dim,),
        "self_attn.kv_a_layernorm": (latent,),
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.draft_vocab_size, hidden),
        "fc": (hidden, len(LAYERS) * hidden),
        "self_attn.qkv_a_proj": (q_dim + latent + config.qk_rope_head_dim, 2 * hidden),
        "self_attn.q_b_proj": (heads * config.qk_head_dim, q_dim),
        "self_attn.embed_q": (heads, config.qk_nope_head_dim, latent),
        "self_attn.unembed_out": (heads, config.v_head_dim, latent),
        "self_attn.o_proj": (hidden, heads * config.v_head_dim),
        "mlp.gate_up_proj": (2 * inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def _random_weight(shape: tuple[int, ...], seed: int) -> Weight:
    """Return a norm, or a quantized matrix whose outputs have about the size of its inputs."""
    values = mx.random.normal(shape, key=mx.random.key(seed))
    if len(shape) == 1:
        return Weight((1 + 0.1 * values).astype(mx.bfloat16))
    matrix = (values * shape[-1] ** -0.5).astype(mx.bfloat16)
    weight = Weight(*mx.quantize(matrix, EIGHT_BITS.group_size, EIGHT_BITS.bits), quantization=EIGHT_BITS)
    mx.eval(weight.arrays)
    return weight


def _draft_model(config: DraftConfig, weights: dict[str, Weight], dtype: mx.Dtype) -> DraftModel:
    cast = {name: [make_weight(weight.arrays, weight.quantization, name, dtype)] for name, weight in weights.items()}
    return DraftModel(config, LayerWeights(cast), LAYERS)


def _logits(draft: DraftModel, tokens: mx.array, captured: mx.array) -> tuple[mx.array, mx.array]:
    """Return the logits of rows with captured states, in two steps, and of those that are fed back."""
    cache, length = draft.make_cache(), captured.shape[1]
    positions = [*range(length // 2), *range(length // 2 + 5, length + 5)]
    states, embeddings = draft.fuse(captured), draft.embed(tokens)
    logits: list[mx.array] = []
    output = states
    for start, stop in ((0, length - 1), (length - 1, length)):
        layout = draft.layout([(start, stop - start)], positions[start:stop])
        output = draft(embeddings[:, start:stop], states[:, start:stop], [cache], layout)
        logits.append(draft.logits(output))
    fed_back: list[mx.array] = []
    for row in range(length, length + NUM_FED_BACK):
        output = draft(embeddings[:, row : row + 1], output, [cache], draft.layout([(row, 1)], [row + 5]))
        fed_back.append(draft.logits(output))
    found = mx.concatenate(logits, axis=1), mx.concatenate(fed_back, axis=1)
    mx.eval(found)
    return found


def _measure(context: Context, config: DraftConfig, weights: dict[str, Weight]) -> None:
    """Measure a draft token of a published draft model: a row with a head of the whole vocabulary."""
    size = FULL_VOCAB_SIZE if context.sizes.has_k2_widths else VOCAB_SIZE
    head = Weight(mx.zeros((size, config.hidden_size), mx.bfloat16))
    arrays = mx.quantize(head.weight, EIGHT_BITS.group_size, EIGHT_BITS.bits)
    entries = {**weights, "lm_head": Weight(*arrays, quantization=EIGHT_BITS)}
    dtype = mx.float32 if context.device == "cpu" else mx.bfloat16
    draft = _draft_model(replace(config, draft_vocab_size=size), entries, dtype)
    cached = context.sizes.contexts[0]
    cache = draft.make_cache()
    width = config.kv_lora_rank + config.qk_rope_head_dim
    cache.append(mx.random.normal((1, 1, cached, width)).astype(dtype))
    states = mx.random.normal((1, 1, config.hidden_size)).astype(dtype)
    token = random_tokens(1, config.vocab_size)

    def run() -> mx.array:
        output = draft(draft.embed(token), states, [cache], draft.layout([(cached, 1)], [cached]))
        cache.trim(1)
        return mx.argmax(draft.logits(output), axis=-1)

    context.measure("draft token", f"{cached} cached", context.median_s(run) * 1e3, "ms")
