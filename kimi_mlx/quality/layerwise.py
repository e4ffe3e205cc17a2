"""Run texts through a model one layer at a time, so that only one layer is in memory.

All texts pass through a layer, then the layer is freed and the next one is read. Memory: the largest layer, and the
hidden states of all tokens. So models that do not fit into memory can be compared; their weights are read once.

Letters: B batch (1), L length of a window, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.decoder import Communicator, Model, SequenceSlice
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Embedding, Linear
from kimi_mlx.weights.assemble import load_layer
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.index import read_index
from kimi_mlx.weights.layer_plan import plan_layer, plan_top
from kimi_mlx.weights.reader import CheckpointReader

Windows = Sequence[Sequence[int]]
"""Token ids of separate sequences."""

LayerProgress = Callable[[int, int], None]
"""Called with the number of layers done and their total."""

LayerCallback = Callable[[int, Model], None]
"""Called with the number of a layer and a model of this layer alone, before tokens pass it."""


class LayerwiseModel:
    """A checkpoint that is run layer by layer.

    Args:
        folder: folder of the checkpoint.
        config: its configuration.
        dtype: compute dtype.

    Raises:
        WeightsError: missing, unknown or wrongly stored tensors.
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype: mx.Dtype):
        self.folder, self.config, self.dtype = folder, config, dtype
        fp8_dtype = {mx.bfloat16: "BF16", mx.float16: "F16"}.get(dtype, "F32")
        checkpoint = Checkpoint(config, read_index(folder), str(folder), fp8_dtype)
        checkpoint.check_names()
        self.reader = CheckpointReader(checkpoint)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size_bytes for info in self.reader.checkpoint.tensors.values())

    def hidden(
        self,
        windows: Windows,
        progress: LayerProgress = lambda done, total: None,
        on_layer: LayerCallback = lambda layer, model: None,
        after_layer: Callable[[int], None] = lambda layer: None,
    ) -> list[mx.array]:
        """Return the hidden states after the last layer, (1, L, D) for each window.

        Args:
            windows: token ids; each window is a sequence of its own.
            progress: callback at the start and after each layer.
            on_layer: callback before each layer.
            after_layer: callback with the number of each layer after it.
        """
        total = self.config.num_hidden_layers
        progress(0, total)
        states = self._embed(windows)
        for layer in range(total):
            communicator = _LayerCommunicator()
            weights = [LayerWeights({})] * total
            weights[layer] = load_layer(self.reader, plan_layer(self.reader.checkpoint, layer, None), self.dtype)
            model = Model(self.config, LayerWeights({}), weights, communicator)
            self.reader.close()  # pages of memory maps count as used memory
            on_layer(layer, model)
            for number, window in enumerate(windows):
                communicator.states = states[number]
                slices = [SequenceSlice(model.make_cache(), len(window), len(window))]
                states[number] = model.hidden(mx.array([list(window)]), slices)
                mx.eval(states[number])
            after_layer(layer)
            del model, weights
            mx.clear_cache()
            progress(layer + 1, total)
        return states

    def _embed(self, windows: Windows) -> list[mx.array]:
        weights = self._top("model.embed_tokens")
        embedding = Embedding(weights.matrix("model.embed_tokens"))
        states = [embedding(mx.array([list(window)])).astype(self.dtype) for window in windows]
        mx.eval(states)
        return states

    def head(self) -> Head:
        """Load the last norm and the head."""
        return Head(self._top("model.norm", "lm_head"), self.config.rms_norm_eps)

    def _top(self, *entries: str) -> LayerWeights:
        plan = plan_top(self.reader.checkpoint, None)
        for name in set(plan.entries) - set(entries):
            del plan.entries[name]
        weights = load_layer(self.reader, plan, self.dtype)
        self.reader.close()
        return weights


class Head:
    """The last norm and the head of a model.

    Args:
        weights: their weights.
        eps: epsilon of the norm.
    """

    def __init__(self, weights: LayerWeights, eps: float):
        self._norm, self._eps = weights.array("model.norm"), eps
        self._linear = Linear(weights.matrix("lm_head"))

    def normed(self, hidden: mx.array) -> mx.array:
        """Return the input of the head: (..., D) -> (..., D)."""
        return mx.fast.rms_norm(hidden, self._norm, self._eps)

    def log_probabilities(self, hidden: mx.array) -> mx.array:
        """Return log-probabilities of the next token in float32: (..., D) -> (..., vocab_size)."""
        logits = self._linear(self.normed(hidden)).astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class _LayerCommunicator(Communicator):
    """Communicator of one layer: takes its input from `states`, and returns the states of all tokens."""

    has_next_stage = True

    def __init__(self) -> None:
        self.states = mx.zeros((1, 0, 0))

    def recv_from_previous_stage(self, tokens: mx.array) -> mx.array:
        return self.states

    def send_to_next_stage(self, hidden: mx.array, tokens: mx.array, num_logits: int) -> mx.array:
        return hidden
