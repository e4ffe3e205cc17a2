"""4-bit affine quantization, for the export and for rounding in the last part of the training."""

from __future__ import annotations

import mlx.core as mx

from scripts.mini.model import Parameters

GROUP_SIZE = 32
BITS = 4


def is_quantized(name: str, value: mx.array) -> bool:
    """Return whether a tensor is quantized: every matrix except the routers'."""
    return value.ndim >= 2 and not name.endswith("mlp.gate.weight")


def fake_quantize(parameters: Parameters) -> Parameters:
    """Return the parameters rounded as on disk; gradients pass through unchanged."""
    rounded = dict(parameters)
    for name, value in parameters.items():
        if is_quantized(name, value):
            source = mx.stop_gradient(value)
            weight = mx.dequantize(*mx.quantize(source, GROUP_SIZE, BITS), GROUP_SIZE, BITS)
            rounded[name] = value + mx.stop_gradient(weight - source)
    return rounded


def quantize(parameters: Parameters) -> Parameters:
    """Return the tensors of a checkpoint: `weight`, `scales`, `biases` of each matrix, and the rest unchanged."""
    tensors: Parameters = {}
    for name, value in parameters.items():
        if is_quantized(name, value):
            base = name.removesuffix("weight")
            tensors[name], tensors[f"{base}scales"], tensors[f"{base}biases"] = mx.quantize(value, GROUP_SIZE, BITS)
        else:
            tensors[name] = value
    return tensors


def dequantize(tensors: Parameters) -> Parameters:
    """Return the float parameters for the output of `quantize`."""
    parameters: Parameters = {}
    for name, value in tensors.items():
        base = name.removesuffix("weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{base}scales" in tensors:
            value = mx.dequantize(value, tensors[f"{base}scales"], tensors[f"{base}biases"], GROUP_SIZE, BITS)
        parameters[name] = value
    return parameters
