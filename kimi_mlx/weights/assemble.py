"""Load a model from a checkpoint: carry out the plans of kimi_mlx.weights.layer_plan in memory, for one rank.

Only the rank's slice of each matrix is read, directly into its place in the fused array.
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
from kimi_mlx.model.vision import VisionTower
from kimi_mlx.model.weight import Weight
from kimi_mlx.parallel.placement import RankShare
from kimi_mlx.weights.dequantize import MLX_TYPES
from kimi_mlx.weights.expert_plan import split_experts
from kimi_mlx.weights.layer_plan import plan_layer, plan_top, plan_vision
from kimi_mlx.weights.plan import ArrayPlan, LayerPlan
from kimi_mlx.weights.reader import C, CheckpointReader, open_checkpoint
from kimi_mlx.weights.streamed_experts import ExpertStreaming

ProgressCallback = Callable[[int, int], None]
"""Called with the number of layers loaded and the total."""


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: mx.Dtype,
    share: RankShare | None = None,
    communicator: Communicator | None = None,
    progress: ProgressCallback = lambda done, total: None,
    streaming: ExpertStreaming | None = None,
) -> Model:
    """Build the model, or one rank's share of it, layer by layer.

    Its `vision` is None if the checkpoint has no vision tower, or another rank holds it.

    Args:
        folder: folder of the checkpoint.
        config: configuration of the model.
        dtype: compute dtype; float weights, scales and biases are cast to it.
        share: share of this rank; None for the whole model.
        communicator: communication with the other ranks; None for a single rank.
        progress: callback after each layer.
        streaming: how routed experts are streamed; None to load all of them. A stack of experts has only the shared
            ones then, or does not exist (kimi_mlx.weights.expert_plan.split_experts).

    Raises:
        WeightsError: missing, unknown or wrongly stored tensors.
    """
    reader = open_checkpoint(folder, config)

    def layers() -> Iterator[LayerWeights]:
        for layer in range(config.num_hidden_layers):
            plan = plan_layer(reader.checkpoint, layer, share)
            yield load_layer(reader, plan if streaming is None else split_experts(plan)[0], dtype)
            reader.close()  # pages of memory maps count as used memory
        yield load_layer(reader, plan_top(reader.checkpoint, share), dtype)

    vision = load_layer(reader, plan_vision(reader.checkpoint, share), dtype)
    return build_model(config, layers(), vision, communicator, progress, streaming)


def build_model(
    config: ModelConfig,
    layers: Iterator[LayerWeights],
    vision: LayerWeights,
    communicator: Communicator | None,
    progress: ProgressCallback,
    streaming: ExpertStreaming | None = None,
) -> Model:
    """Evaluate layers one after the other and build the model from them.

    Args:
        config: configuration of the model.
        layers: weights of the layers, then of the top; lazy arrays are read here.
        vision: weights of the vision tower; without entries on a rank without it.
        communicator: communication with the other ranks; None for a single rank.
        progress: callback after each layer, and after each layer whose slots for experts are filled.
        streaming: how routed experts are streamed, which the layers lack; None if they have all. Its reader is closed
            after an error.
    """
    try:
        return _build(config, layers, vision, communicator, progress, streaming)
    except BaseException:
        if streaming is not None:
            streaming.reader.close()
        raise


def _build(
    config: ModelConfig,
    layers: Iterator[LayerWeights],
    vision: LayerWeights,
    communicator: Communicator | None,
    progress: ProgressCallback,
    streaming: ExpertStreaming | None,
) -> Model:
    mx.eval(vision.arrays)
    tower = VisionTower(config.vision, vision) if config.vision is not None and vision.entries else None
    total = config.num_hidden_layers + 1
    done: list[LayerWeights] = []
    if streaming is not None:
        layers, total = streaming.with_routed(layers), total + len(streaming.reader.sources)
    for weights in layers:
        mx.eval(weights.arrays)  # one layer at a time: a single huge evaluation trips macOS's GPU watchdog
        done.append(weights)
        progress(len(done), total)
    *hidden, top = done
    if streaming is None:
        return Model(config, top, hidden, communicator, tower)
    streamer = streaming.streamer(config)
    model = Model(config, top, hidden, communicator, tower, streamer)
    with streaming.reader.choosing_depth():
        for number, _ in enumerate(streamer.fill(), len(done) + 1):
            progress(number, total)
    return model


def make_weight(arrays: list[mx.array], quantization: Quantization | None, entry: str, dtype: mx.Dtype) -> Weight:
    """Return a weight made of its stored arrays, floats in the compute dtype.

    Args:
        arrays: weight, and scales and biases if quantized; lazy arrays are read here if they need a cast.
        quantization: quantization of the weight; None if float.
        entry: name in the canonical tree; the router stays in float32.
        dtype: compute dtype.
    """
    target = mx.float32 if entry.startswith("mlp.gate.") or entry == "mlp.gate" else dtype
    return Weight(*(_cast(array, target) for array in arrays), quantization=quantization, dtype=dtype)


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast floats to a type; integers are packed values or scales of 8-bit floats, and stay as they are."""
    if array.dtype == dtype or not mx.issubdtype(array.dtype, mx.floating):
        return array
    mx.eval(array)  # else the cast, a GPU operation, would wait for the disk, and macOS may end it
    cast = array.astype(dtype)
    mx.eval(cast)  # so that the original is freed now
    return cast


def load_layer(reader: CheckpointReader[C], plan: LayerPlan, dtype: mx.Dtype) -> LayerWeights:
    """Read the weights of a plan, floats in the compute dtype."""
    entries = {
        entry: [
            make_weight([_read(reader, array) for array in part.arrays], part.quantization, entry, dtype)
            for part in parts
        ]
        for entry, parts in plan.entries.items()
    }
    return LayerWeights(entries, plan.latent_first, plan.num_fused_shared, plan.first_expert)


def _read(reader: CheckpointReader[C], plan: ArrayPlan) -> mx.array:
    """Read an array directly into MLX's memory, so that there is no second copy of it."""
    dtype = MLX_TYPES[plan.dtype]
    array = mx.zeros(plan.shape, mx.uint16 if dtype == mx.bfloat16 else dtype)
    mx.eval(array)
    view = np.asarray(array)
    assert not view.flags.owndata
    reader.read_into(plan, view)
    return array.view(dtype)
