"""Map tensor names of a draft model to the entries from which kimi_mlx.model.draft_model builds it.

Published files name the layer `midlayer.` or `layers.0.`, both with or without `model.` in front, which may also
precede the other names. This module uses names and dimensions only, and never reads a file.
"""

from __future__ import annotations

from kimi_mlx.model.draft_config import LAYER, DraftConfig
from kimi_mlx.model.names import CheckpointLayout, TreeEntry, attention_entries, mlp_entries, single_entry

TOKEN_OFFSETS, IS_DRAFTED = "d2t", "t2d"
"""Tensors of a reduced vocabulary: token minus id for each drafted id, and whether each token is drafted."""

EMBEDDING = "embed_tokens.weight"
"""Embedding; a draft model without one uses that of the model."""


def draft_entries(config: DraftConfig, layout: CheckpointLayout) -> list[TreeEntry]:
    """Return all entries of a draft model.

    Args:
        config: dimensions of the draft model.
        layout: layout of the checkpoint, by canonical names.
    """
    hidden, target = config.hidden_size, config.target_hidden_size
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    entries = [
        single_entry("fc", "fc", (hidden, config.num_captured * target)),
        single_entry("norm", "norm", (hidden,)),
        single_entry("lm_head", "lm_head", (config.draft_vocab_size, hidden)),
        *(single_entry(name, LAYER + name, (hidden,)) for name in norms),
        *attention_entries(config, LAYER, layout, input_size=2 * hidden),
        *mlp_entries(config, LAYER, "mlp", config.intermediate_size, "dense_rows"),
    ]
    if config.fc_norm:
        entries += [single_entry(f"fc_norm.{i}", f"fc_norm.{i}", (target,)) for i in range(config.num_captured)]
    if layout.has(EMBEDDING):
        entries.append(single_entry("embed_tokens", "embed_tokens", (config.vocab_size, hidden)))
    return entries
