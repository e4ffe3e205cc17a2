"""Load a draft model on rank 0, and make all ranks capture the states that it reads."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.model.decoder import Model
from kimi_mlx.model.draft_config import MAX_CAPTURED_LAYERS
from kimi_mlx.model.draft_model import DraftModel
from kimi_mlx.parallel.group import Group, gather_on_host
from kimi_mlx.runtime.load import load_draft_model

WARM_UP_ROWS = 4


def open_draft_model(folder: Path | None, model: Model, group: Group) -> DraftModel | None:
    """Load a draft model, and capture its layers. Collective: one gather.

    Args:
        folder: folder of the draft model; only used on rank 0.
        model: the model, or this rank's share of it.
        group: the ranks.

    Returns:
        The draft model on rank 0, and None on the others.

    Raises:
        ConfigError: the draft model is not supported, or is made for another model.
        WeightsError: its files are missing, broken or do not fit their `config.json`.
    """
    draft = None
    layers = np.full(MAX_CAPTURED_LAYERS, -1, np.int32)
    if group.rank == 0:
        assert folder is not None
        draft = load_draft_model(folder, model)
        layers[: len(draft.captured_layers)] = draft.captured_layers
    agreed = gather_on_host(group, layers)[0]
    model.capture([int(layer) for layer in agreed if layer >= 0])
    return draft


def warm_up_draft(draft: DraftModel) -> None:
    """Compile the kernels: compute some rows, then one more. The results are discarded."""
    cache, width = draft.make_cache(), len(draft.captured_layers) * draft.config.target_hidden_size
    states = draft.fuse(mx.zeros((1, WARM_UP_ROWS, width), draft["input_layernorm"].dtype))
    start = 0
    for count in (WARM_UP_ROWS, 1):
        layout = draft.layout([(start, count)], range(start, start + count))
        states = draft(draft.embed(mx.zeros((1, count), mx.int32)), states, [cache], layout, [1])
        start += count
    mx.eval(draft.logits(states))
