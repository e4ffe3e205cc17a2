"""Run the model once on each rank alone, so that the first step of a request is not slowed by compiling kernels."""

from __future__ import annotations

import mlx.core as mx

from kimi_mlx.model.decoder import Communicator, Model, SequenceSlice
from kimi_mlx.model.vision_config import CHANNELS

PROMPT_TOKENS = 64
"""Number of prompt tokens of the warm-up: enough for the kernels of prefill."""


class SilentCommunicator(Communicator):
    """Communicator that sends nothing. A rank without the embedding receives zeros.

    Args:
        hidden_size: size of a hidden state.
        dtype: dtype of the hidden states.
    """

    def __init__(self, hidden_size: int, dtype: mx.Dtype):
        self._hidden_size, self._dtype = hidden_size, dtype

    def recv_from_previous_stage(self, tokens: mx.array) -> mx.array:
        """Return zeros instead of the hidden states of the previous rank."""
        return mx.zeros((*tokens.shape, self._hidden_size), self._dtype)


def warm_up(model: Model) -> None:
    """Compute a short prompt, one token and the smallest image without any collective. The results are discarded."""
    communicator = model.communicator
    model.set_communicator(SilentCommunicator(model.config.hidden_size, model.layers[0]["input_layernorm"].dtype))
    try:
        cache = model.make_cache()
        for length in (min(PROMPT_TOKENS, model.config.max_position_embeddings - 1), 1):
            hidden = model.hidden(mx.zeros((1, length), mx.int32), [SequenceSlice(cache, length)])
            mx.eval(model.logits(hidden) if model.has_head else hidden)
        if model.vision is not None:
            (rows, columns), size = model.vision.config.merge_kernel_size, model.vision.config.patch_size
            model.image_features(mx.zeros((rows * columns, CHANNELS, size, size), mx.uint8), [(1, rows, columns)])
    finally:
        model.set_communicator(communicator)
