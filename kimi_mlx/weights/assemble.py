"""Load a model from a checkpoint: carry out the plans of kimi_mlx.weights.layer_plan in memory, for one rank.

Each matrix is read once, only as far as the rank holds it, straight into its place in the fused array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.decoder import Communicator, Model
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Weight
from kimi_mlx.parallel.placement import RankShare
from kimi_mlx.weights.layer_plan import ArrayPlan, LayerPlan, plan_layer, plan_top
from kimi_mlx.weights.reader import CheckpointReader, open_checkpoint

MLX_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}

ProgressCallback = Callable[[int, int], None]
"""Called with the number of layers loaded and the total."""


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: mx.Dtype,
    share: RankShare | None = None,
    communicator: Communicator | None = None,
    progress: ProgressCallback = lambda done, total: None,
) -> Model:
    """Build the model, or one rank's share of it, layer by layer.

    Args:
        folder: the checkpoint: `*.safetensors`, with an index if there are several.
        config: its configuration.
        dtype: of the computation: float weights, scales and biases are cast to it.
        share: share of this rank; None for the whole model.
        communicator: the rank's link to the others; None without others.
        progress: callback after each layer.

    Raises:
        WeightsError: missing, unknown or wrongly stored tensors, all named.
    """
    reader = open_checkpoint(folder, config)

    def layers() -> Iterator[LayerWeights]:
        for layer in range(config.num_hidden_layers):
            yield _load_layer(reader, plan_layer(reader.checkpoint, layer, share), dtype)
            reader.close()  # mapped pages count as used memory
        yield _load_layer(reader, plan_top(reader.checkpoint, share), dtype)

    return build_model(config, layers(), communicator, progress)


def build_model(
    config: ModelConfig, layers: Iterator[LayerWeights], communicator: Communicator | None, progress: ProgressCallback
) -> Model:
    """Evaluate layers one after the other and build the model from them.

    Args:
        config: its configuration.
        layers: the layers, then the top; lazy arrays are read here.
        communicator: the rank's link to the others; None without others.
        progress: callback after each layer.
    """
    total = config.num_hidden_layers + 1
    done: list[LayerWeights] = []
    for weights in layers:
        mx.eval(weights.arrays)  # one layer at a time: a single huge evaluation trips macOS's GPU watchdog
        done.append(weights)
        progress(len(done), total)
    *hidden, top = done
    return Model(config, top, hidden, communicator)


def make_weight(arrays: list[mx.array], quantization: Quantization | None, entry: str, dtype: mx.Dtype) -> Weight:
    """A weight from its stored arrays, floats in the compute dtype.

    Args:
        arrays: weight, and scales and biases if quantized.
        quantization: of the weight.
        entry: its name in the canonical tree; the router's bias stays in float32.
        dtype: of the computation.
    """
    target = mx.float32 if entry.endswith("e_score_correction_bias") else dtype
    cast = (array if array.dtype == mx.uint32 else array.astype(target) for array in arrays)
    return Weight(*cast, quantization=quantization)


def _load_layer(reader: CheckpointReader, plan: LayerPlan, dtype: mx.Dtype) -> LayerWeights:
    entries = {
        entry: [
            make_weight([_read(reader, array) for array in part.arrays], part.quantization, entry, dtype)
            for part in parts
        ]
        for entry, parts in plan.entries.items()
    }
    return LayerWeights(entries, plan.latent_first, plan.num_fused_shared, plan.first_expert)


def _read(reader: CheckpointReader, plan: ArrayPlan) -> mx.array:
    field = reader.read_array(plan)
    # numpy reads from the disk without holding Python's lock, so a rank's heartbeat continues
    array = mx.array(field if field.flags.owndata and field.flags.c_contiguous else np.array(field, order="C"))
    return array.view(mx.bfloat16) if plan.dtype == "BF16" else array
