"""The canonical parameter tree: what the model is built from, whatever layout it was read from.

Fused projections are fused and experts are stacked. A layer's entries, by name (shapes are rows x columns of the
unquantized matrix; F is the rank's share of the expert rows, S the shared experts fused into the stack):

    input_layernorm, post_attention_layernorm        (D)
    self_attn.qkv_a_proj                             (q_lora_rank + R + P, D), or (H * (N + P) + R + P, D)
    self_attn.q_a_layernorm, self_attn.q_b_proj      (q_lora_rank), (H * (N + P), q_lora_rank); not without q_lora
    self_attn.kv_a_layernorm                         (R)
    self_attn.embed_q                                (H, R, N) if latent_first, else (H, N, R)
    self_attn.unembed_out, self_attn.o_proj          (H, V, R), (D, H * V)
    mlp.gate, mlp.gate.e_score_correction_bias       (E, D), (E)                    MoE layers
    mlp.experts.gate_up_proj, .down_proj             (E + S, 2 * F, D), (E + S, D, F)
    mlp.shared_experts.gate_up_proj, .down_proj      when quantized otherwise than the routed ones
    mlp.gate_up_proj, mlp.down_proj                  dense layers

At the top: `model.embed_tokens`, `model.norm`, `lm_head`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from kimi_mlx.model.weight import Weight


@dataclass(frozen=True)
class LayerWeights:
    """The entries of one layer (or of the top), ready to be built into modules.

    Args:
        entries: name -> the parts of the weight; one part, unless parts are quantized differently.
        latent_first: whether self_attn.embed_q is (H, R, N).
        num_fused_shared: shared experts that stand at the end of the stack of experts.
        first_expert: the number of the first routed expert in the stack, where a rank holds only some.
    """

    entries: Mapping[str, Sequence[Weight]]
    latent_first: bool = False
    num_fused_shared: int = 0
    first_expert: int = 0

    def has(self, name: str) -> bool:
        """Whether there is an entry."""
        return name in self.entries

    def matrices(self, name: str) -> Sequence[Weight]:
        """The parts of a fused matrix."""
        return self.entries[name]

    def matrix(self, name: str) -> Weight:
        """A matrix that has one part."""
        (part,) = self.entries[name]
        return part

    def array(self, name: str) -> mx.array:
        """A weight that is never quantized."""
        return self.matrix(name).weight

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, for evaluation."""
        return [array for parts in self.entries.values() for part in parts for array in part.arrays]
