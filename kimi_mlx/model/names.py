"""Map tensor names of a text model to the entries of the canonical tree (kimi_mlx.model.tree).

Checkpoints come in Hugging Face's layout (experts one by one, `kv_b_proj` whole) and in MLX's (experts stacked as
`switch_mlp`, `kv_b_proj` often split into `embed_q` and `unembed_out`), float or quantized. This module uses
names and dimensions only, and never reads a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kimi_mlx.model.config import DecoderConfig, ModelConfig
from kimi_mlx.model.config_quantization import Quantization

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Suffixes of tensors that the model does not use: rotary buffers of old files."""

FLOAT_MATRICES = (".mlp.gate", ".patch_embed.proj", ".patch_embed.pos_emb")
"""Ends of the paths of matrices that are never quantized: the router, and the vision tower's patches and positions."""

TEXT_PREFIX = "language_model."
"""Prefix of the text model's tensors in K2.5 and later."""


@dataclass(frozen=True)
class ShardedAxis:
    """An axis of the unquantized matrix that is sharded over ranks.

    Args:
        share_field: field of RankShare with the rank's range, such as `expert_rows` or `heads`.
        axis: sharded axis; `stack` is the axis of experts or heads, even where these are stored as separate tensors.
        unit: rows or columns per element of the range, such as those of one head.
    """

    share_field: str
    axis: Literal["stack", "rows", "columns"]
    unit: int = 1


@dataclass(frozen=True)
class SourceMatrix:
    """A matrix of the checkpoint and how it is used.

    Args:
        paths: tensor name without suffix; one name per expert if experts are stored one by one.
        shape: unquantized shape: (rows, columns), or (experts or heads, rows, columns) if stacked, or (extent,).
        sharded_axes: axes that may be sharded over ranks.
        blocks: number of shared experts that are concatenated along the first sharded axis and become a stack; 0 for
            other matrices.
        heads: (number of heads, first row, end row) for a part of `kv_b_proj`: these rows of each head, out of the
            rows of all heads, become a stack of one member per head; None for other matrices.
        suffix: suffix of the tensor's name.
        kernel: (channels, height, width) of a convolution over separate patches, which is a matrix in the canonical
            form and may be stored with four axes, with the channels second or last; None for other matrices.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    sharded_axes: tuple[ShardedAxis, ...] = ()
    blocks: int = 0
    heads: tuple[int, int, int] | None = None
    suffix: str = ".weight"
    kernel: tuple[int, int, int] | None = None

    @property
    def is_float(self) -> bool:
        """Whether the model needs the matrix as floats: vectors, and those of FLOAT_MATRICES."""
        return len(self.shape) == 1 or self.paths[0].endswith(FLOAT_MATRICES)


@dataclass(frozen=True)
class TreeEntry:
    """An entry of the canonical tree.

    Args:
        name: name of the entry.
        parts: matrices whose rows are concatenated (gate and up, q_a and kv_a). Each is a tuple of sources that are
            stacked (routed experts, then shared ones).
    """

    name: str
    parts: tuple[tuple[SourceMatrix, ...], ...]


@dataclass(frozen=True)
class CheckpointLayout:
    """Properties of a checkpoint that determine its entries.

    Args:
        has: function that returns whether a tensor of this full name exists.
        quantization: function that returns the quantization of the matrix at a path; None if float.
    """

    has: Callable[[str], bool]
    quantization: Callable[[str], Quantization | None]


def top_entries(config: ModelConfig) -> list[TreeEntry]:
    """Return the entries of the top: embedding, last norm and head."""
    table = (config.vocab_size, config.hidden_size)
    return [
        single_entry("model.embed_tokens", "model.embed_tokens", table, ShardedAxis("embed_rows", "rows")),
        single_entry("model.norm", "model.norm", (config.hidden_size,)),
        single_entry("lm_head", "lm_head", table, ShardedAxis("vocab_rows", "rows")),
    ]


def layer_entries(
    config: ModelConfig, layer: int, layout: CheckpointLayout, fuses_shared: bool = True
) -> list[TreeEntry]:
    """Return the entries of one layer, in the checkpoint's layout.

    Args:
        config: dimensions of the model.
        layer: number of the layer.
        layout: layout of the checkpoint.
        fuses_shared: whether to stack shared experts with the routed ones if both have the same quantization.
    """
    prefix = f"model.layers.{layer}."
    norms = ("input_layernorm", "post_attention_layernorm")
    entries = [single_entry(name, prefix + name, (config.hidden_size,)) for name in norms]
    entries += attention_entries(config, prefix, layout)
    if config.is_moe_layer(layer):
        fused = num_fused_shared(config, layer, layout) if fuses_shared else 0
        entries += _moe_entries(config, prefix, layout, fused)
    else:
        entries += mlp_entries(config, prefix, "mlp", config.intermediate_size, "dense_rows")
    return entries


def num_fused_shared(config: ModelConfig, layer: int, layout: CheckpointLayout) -> int:
    """Return the number of shared experts in the stack of routed ones: all if quantized alike, else 0."""
    if not config.is_moe_layer(layer) or not config.n_shared_experts:
        return 0
    prefix = f"model.layers.{layer}.mlp."
    for name in ("gate_proj", "up_proj", "down_proj"):
        routed = _expert_paths(config, prefix, name, layout)[0]
        if layout.quantization(routed) != layout.quantization(f"{prefix}shared_experts.{name}"):
            return 0
    return config.n_shared_experts


def is_latent_first(layer: int, layout: CheckpointLayout) -> bool:
    """Return whether the key projection is stored as (heads, latent, nope), as mlx-lm's `embed_q` is."""
    return layout.has(f"model.layers.{layer}.self_attn.embed_q.weight")


def single_entry(
    name: str, path: str, shape: tuple[int, ...], *sharded_axes: ShardedAxis, suffix: str = ".weight"
) -> TreeEntry:
    """Return an entry that is one tensor of the checkpoint."""
    return TreeEntry(name, ((SourceMatrix((path,), shape, sharded_axes, suffix=suffix),),))


def attention_entries(
    config: DecoderConfig, prefix: str, layout: CheckpointLayout, input_size: int | None = None
) -> list[TreeEntry]:
    """Return the entries of the attention of the layer whose names begin with `prefix`.

    Args:
        config: dimensions of the model.
        prefix: beginning of the layer's names, with a full stop.
        layout: layout of the checkpoint.
        input_size: size of the input; None for hidden_size.
    """
    c, hidden, inputs = config, config.hidden_size, input_size or config.hidden_size
    path = prefix + "self_attn."
    q_rows = c.num_attention_heads * c.qk_head_dim
    latent_rows = c.kv_lora_rank + c.qk_rope_head_dim
    by_head = ShardedAxis("heads", "rows", c.qk_head_dim)
    kv_a = SourceMatrix((path + "kv_a_proj_with_mqa",), (latent_rows, inputs))
    if c.q_lora_rank is None:
        entries, q_a = [], SourceMatrix((path + "q_proj",), (q_rows, inputs), (by_head,))
    else:
        q_a = SourceMatrix((path + "q_a_proj",), (c.q_lora_rank, inputs))
        entries = [
            single_entry("self_attn.q_a_layernorm", path + "q_a_layernorm", (c.q_lora_rank,)),
            single_entry("self_attn.q_b_proj", path + "q_b_proj", (q_rows, c.q_lora_rank), by_head),
        ]
    return [
        *entries,
        TreeEntry("self_attn.qkv_a_proj", ((q_a,), (kv_a,))),
        single_entry("self_attn.kv_a_layernorm", path + "kv_a_layernorm", (c.kv_lora_rank,)),
        *_kv_b_entries(c, path, layout),
        single_entry(
            "self_attn.o_proj",
            path + "o_proj",
            (hidden, c.num_attention_heads * c.v_head_dim),
            ShardedAxis("heads", "columns", c.v_head_dim),
        ),
    ]


def _kv_b_entries(config: DecoderConfig, path: str, layout: CheckpointLayout) -> list[TreeEntry]:
    """Return the projections from latent to keys and values, stored separately (mlx-lm) or as rows of `kv_b_proj`."""
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    latent = config.kv_lora_rank
    by_head = ShardedAxis("heads", "stack")
    if layout.has(path + "embed_q.weight"):
        return [
            single_entry("self_attn.embed_q", path + "embed_q", (heads, latent, nope), by_head),
            single_entry("self_attn.unembed_out", path + "unembed_out", (heads, value, latent), by_head),
        ]
    shape = (heads * (nope + value), latent)
    keys = SourceMatrix((path + "kv_b_proj",), shape, (by_head,), heads=(heads, 0, nope))
    values = SourceMatrix((path + "kv_b_proj",), shape, (by_head,), heads=(heads, nope, nope + value))
    return [TreeEntry("self_attn.embed_q", ((keys,),)), TreeEntry("self_attn.unembed_out", ((values,),))]


def mlp_entries(config: DecoderConfig, prefix: str, name: str, width: int, share_field: str) -> list[TreeEntry]:
    """Return the entries of a dense MLP, or of shared experts, of the layer whose names begin with `prefix`."""
    path, hidden = f"{prefix}{name}.", config.hidden_size
    rows = (ShardedAxis(share_field, "rows"),)
    gate, up = (SourceMatrix((path + projection,), (width, hidden), rows) for projection in ("gate_proj", "up_proj"))
    return [
        TreeEntry(f"{name}.gate_up_proj", ((gate,), (up,))),
        single_entry(f"{name}.down_proj", path + "down_proj", (hidden, width), ShardedAxis(share_field, "columns")),
    ]


def _moe_entries(config: ModelConfig, prefix: str, layout: CheckpointLayout, fused: int) -> list[TreeEntry]:
    gate, up, down = (
        _experts(config, prefix + "mlp.", name, layout, fused) for name in ("gate_proj", "up_proj", "down_proj")
    )
    gate_path = prefix + "mlp.gate"
    bias_name = "mlp.gate.e_score_correction_bias"
    experts = (config.n_routed_experts,)
    entries = [
        single_entry("mlp.gate", gate_path, (*experts, config.hidden_size)),
        single_entry(bias_name, gate_path, experts, suffix=".e_score_correction_bias"),
        TreeEntry("mlp.experts.gate_up_proj", (gate, up)),
        TreeEntry("mlp.experts.down_proj", (down,)),
    ]
    if config.n_shared_experts and not fused:
        width = config.n_shared_experts * config.moe_intermediate_size
        entries += mlp_entries(config, prefix, "mlp.shared_experts", width, "shared_rows")
    return entries


def _experts(
    config: ModelConfig, prefix: str, name: str, layout: CheckpointLayout, fused: int
) -> tuple[SourceMatrix, ...]:
    """Return one projection of all routed experts, and of the shared ones that are fused with them."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    is_down = name == "down_proj"
    expert_shape = (hidden, width) if is_down else (width, hidden)
    sharded = ShardedAxis("expert_rows", "columns" if is_down else "rows")
    paths = _expert_paths(config, prefix, name, layout)
    shape = expert_shape if len(paths) > 1 else (config.n_routed_experts, *expert_shape)
    routed = SourceMatrix(paths, shape, (sharded, ShardedAxis("experts", "stack")))
    if not fused:
        return (routed,)
    block = (hidden, width * fused) if is_down else (width * fused, hidden)
    return routed, SourceMatrix((f"{prefix}shared_experts.{name}",), block, (sharded,), blocks=fused)


def _expert_paths(config: ModelConfig, prefix: str, name: str, layout: CheckpointLayout) -> tuple[str, ...]:
    stacked = f"{prefix}switch_mlp.{name}"
    if layout.has(f"{stacked}.weight"):
        return (stacked,)
    return tuple(f"{prefix}experts.{expert}.{name}" for expert in range(config.n_routed_experts))
