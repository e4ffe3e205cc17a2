"""Record the mean squared activations of the input columns of a model's matrices, for an importance file.

Letters: E routed experts, S shared experts fused into the stack, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.decoder import DecoderLayer, Model
from kimi_mlx.model.moe import DenseMLP, MoE
from kimi_mlx.model.weight import ConcatLinear, Linear, Matrix
from kimi_mlx.quality.layerwise import LayerwiseModel, Windows


@dataclass
class InputSums:
    """Sums of squares of one input.

    Args:
        squares: float64 (members, C): sum of the squared activations.
        tokens: int64 (members): number of tokens.
    """

    squares: np.ndarray
    tokens: np.ndarray

    def add(self, squares: mx.array, tokens: mx.array) -> None:
        """Add sums of some tokens, (members, C) and (members)."""
        self.squares += np.array(squares, np.float64)
        self.tokens += np.array(tokens.astype(mx.int64))

    def part(self, start: int, stop: int) -> InputSums:
        """Return the sums of some members."""
        return InputSums(self.squares[start:stop], self.tokens[start:stop])


@dataclass
class InputRecorder:
    """Records the inputs of the matrices of a model that is run layer by layer.

    Args:
        arrays: contents of the importance file so far.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    _sums: dict[str, InputSums] = field(default_factory=dict)
    _num_experts: int = 0

    def watch(self, layer: int, model: Model) -> None:
        """Start to record the inputs of a layer.

        Args:
            layer: number of the layer.
            model: model of this layer alone.
        """
        # experts always run on tokens sorted by expert, whose activations are not weighted by the router
        model.tune(replace(model.tuning, sort_min_choices=0, sort_min_per_expert=0))
        (block,) = model.layers
        assert isinstance(block, DecoderLayer)
        attention, mlp = block.self_attn, block.mlp
        self._sums, self._num_experts = {}, model.config.n_routed_experts
        self._watch_matrix("self_attn.qkv_a_proj", attention.qkv_a_proj)
        if "q_b_proj" in attention:
            self._watch_matrix("self_attn.q_b_proj", attention.q_b_proj)
        self._watch_matrix("self_attn.o_proj", attention.o_proj)
        if isinstance(mlp, MoE):
            self._watch_stack("mlp.experts.gate_up_proj", mlp.gate_up_proj, mlp.num_experts)
            self._watch_stack("mlp.experts.down_proj", mlp.down_proj, mlp.num_experts)
            if "shared_experts" in mlp:
                self._watch_dense("mlp.shared_experts", mlp.shared_experts)
        else:
            self._watch_dense("mlp", mlp)

    def finish(self, layer: int) -> None:
        """Store the sums of a layer after all tokens have passed it.

        Raises:
            WeightsError: an activation is not finite.
        """
        for entry, sums in self._sums.items():
            name = f"model.layers.{layer}.{entry}"
            if ".experts." not in entry:
                self._store(name, sums, is_stack=False)
                continue
            self._store(name, sums.part(0, self._num_experts), is_stack=True)
            if len(sums.tokens) > self._num_experts:
                self._store_fused_shared(name.replace(".experts.", ".shared_experts."), sums)
        self._sums = {}

    def record_head(self, inputs: mx.array) -> None:
        """Record the inputs of the head, (tokens, C)."""
        squares = mx.square(inputs.astype(mx.float32)).sum(axis=0, keepdims=True)
        sums = self._sums.setdefault("lm_head", InputSums(np.zeros(squares.shape), np.zeros(1, np.int64)))
        sums.add(squares, mx.array([len(inputs)]))

    def finish_head(self) -> None:
        """Store the sums of the head.

        Raises:
            WeightsError: an activation is not finite.
        """
        self._store("lm_head", self._sums["lm_head"], is_stack=False)

    def _store_fused_shared(self, name: str, sums: InputSums) -> None:
        """Store the sums of shared experts in the stack: each has a block of the columns of the down projection."""
        shared = sums.part(self._num_experts, len(sums.tokens))
        squares = shared.squares.reshape(1, -1) if name.endswith(".down_proj") else shared.squares[:1]
        self._store(name, InputSums(squares, shared.tokens[:1]), is_stack=False)

    def _store(self, name: str, sums: InputSums, is_stack: bool) -> None:
        if not np.isfinite(sums.squares).all():
            raise WeightsError(
                f"the activations of `{name}` are not finite",
                hint="the weights are damaged, or the compute type is too small: try `--dtype float32`",
            )
        means = (sums.squares / np.maximum(sums.tokens, 1)[:, None]).astype(np.float32)
        self.arrays[f"{name}.mean_square"] = means if is_stack else means[0]
        self.arrays[f"{name}.tokens"] = sums.tokens

    def _watch_dense(self, path: str, mlp: DenseMLP) -> None:
        self._watch_matrix(f"{path}.gate_up_proj", mlp.gate_up_proj)
        self._watch_matrix(f"{path}.down_proj", mlp.down_proj)

    def _watch_matrix(self, name: str, module: Linear | ConcatLinear) -> None:
        matrix = _first_part(module)
        sums = self._sums[name] = InputSums(np.zeros((1, matrix.columns)), np.zeros(1, np.int64))
        matmul = matrix.matmul

        def record(x: mx.array, *args: object, **options: object) -> mx.array:
            rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            sums.add(mx.square(rows).sum(axis=0, keepdims=True), mx.array([len(rows)]))
            return matmul(x, *args, **options)  # pyright: ignore[reportArgumentType]

        _replace(matrix, "matmul", record)

    def _watch_stack(self, name: str, module: Matrix | ConcatLinear, members: int) -> None:
        matrix = _first_part(module)
        sums = self._sums[name] = InputSums(np.zeros((members, matrix.columns)), np.zeros(members, np.int64))
        gather_matmul = matrix.gather_matmul

        def record(x: mx.array, ids: mx.array, inputs: mx.array | None = None) -> mx.array:
            rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
            chosen = ids.flatten()
            positions = mx.arange(len(rows)) if inputs is None else mx.broadcast_to(inputs, ids.shape).flatten()
            uses = mx.zeros((members, len(rows))).at[chosen, positions].add(1.0)
            sums.add(uses @ mx.square(rows), uses.sum(axis=1))
            return gather_matmul(x, ids, inputs)

        _replace(matrix, "gather_matmul", record)


def record_inputs(model: LayerwiseModel, windows: Windows, progress: Callable[[int, int], None]) -> InputRecorder:
    """Run a model over windows and return the statistics of all its inputs.

    Raises:
        WeightsError: an activation is not finite.
    """
    recorder = InputRecorder()
    states = model.hidden(windows, progress, recorder.watch, recorder.finish)
    head = model.head()
    for state in states:
        recorder.record_head(head.normed(state[0]))
    recorder.finish_head()
    return recorder


def _first_part(module: Matrix | ConcatLinear) -> Matrix:
    """Return the matrix, or the first of several with the same input."""
    return module.parts[0] if isinstance(module, ConcatLinear) else module


def _replace(matrix: Matrix, name: str, function: Callable[..., mx.array]) -> None:
    """Replace a method of one matrix."""
    setattr(matrix, name, function)
