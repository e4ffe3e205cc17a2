"""The canonical parameter tree: the form of the weights from which the model is built, for every checkpoint layout.

Projections with the same input are fused, and experts are stacked. Entries of a layer, with the shape (rows, columns)
of the unquantized matrix (F: the rank's share of the expert rows; S: shared experts in the stack of experts):

    input_layernorm, post_attention_layernorm        (D)
    self_attn.qkv_a_proj                             (q_lora_rank + R + P, D), or (H * (N + P) + R + P, D)
    self_attn.q_a_layernorm, self_attn.q_b_proj      (q_lora_rank), (H * (N + P), q_lora_rank); only with q_lora
    self_attn.kv_a_layernorm                         (R)
    self_attn.embed_q                                (H, R, N) if latent_first, else (H, N, R)
    self_attn.unembed_out, self_attn.o_proj          (H, V, R), (D, H * V)
    mlp.gate, mlp.gate.e_score_correction_bias       (E, D), (E)                    MoE layers
    mlp.experts.gate_up_proj, .down_proj             (E + S, 2 * F, D), (E + S, D, F); without the E if `routed` is set
    mlp.shared_experts.gate_up_proj, .down_proj      if their quantization is not that of the routed ones
    mlp.gate_up_proj, mlp.down_proj                  dense layers

At the top: `model.embed_tokens`, `model.norm`, `lm_head`. The entries of the vision tower have the published names, of
matrices and norms without `.weight`, of biases with `.bias` (kimi_mlx.model.vision_names.vision_entries).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from kimi_mlx.model.expert_format import RoutedExperts
from kimi_mlx.model.weight import Weight


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer (or of the top), from which its modules are built.

    Args:
        entries: name -> parts of the weight; more than one if fused matrices have different quantizations.
        latent_first: whether self_attn.embed_q is (H, R, N).
        num_fused_shared: number of shared experts at the end of the stack of experts.
        first_expert: number of the first routed expert in the stack; above 0 if this rank has only later ones.
        routed: routed experts that stay on the disk and are read when needed; None if all are in the entries.
    """

    entries: Mapping[str, Sequence[Weight]]
    latent_first: bool = False
    num_fused_shared: int = 0
    first_expert: int = 0
    routed: RoutedExperts | None = None

    def has(self, name: str) -> bool:
        """Return whether an entry exists."""
        return name in self.entries

    def matrices(self, name: str) -> Sequence[Weight]:
        """Return the parts of a fused matrix."""
        return self.entries[name]

    def matrix(self, name: str) -> Weight:
        """Return a matrix that has one part."""
        (part,) = self.entries[name]
        return part

    def array(self, name: str) -> mx.array:
        """Return a weight that is never quantized."""
        return self.matrix(name).weight

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, for evaluation."""
        return [array for parts in self.entries.values() for part in parts for array in part.arrays]
