"""Plan a conversion to MLX's affine layout: the files of the output, their tensors, and the source of each tensor.

The plan has the same source matrices as the plans of loading (kimi_mlx.weights.layer_plan), whole and not fused, each
with its new quantization. The output has the layout of mlx-lm: experts stacked as `switch_mlp`,
`kv_b_proj` split into `embed_q` and `unembed_out`, K2.5's prefix kept and its vision part left out. This module reads
headers and configuration only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.names import TEXT_PREFIX, SourceMatrix, TreeEntry, layer_entries, top_entries
from kimi_mlx.weights.checkpoint import Checkpoint, MatrixFormat, vision_bytes_of
from kimi_mlx.weights.convert_options import ConvertOptions, TargetFormats, target_formats
from kimi_mlx.weights.file_layout import FileLayout, lay_out
from kimi_mlx.weights.index import DTYPE_BYTES


@dataclass(frozen=True)
class ArraySpec:
    """A tensor of the output: full name, type as safetensors names it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class WeightConversion:
    """A matrix or vector of the output.

    Args:
        path: name without suffix, which is the name of mlx-lm's module.
        kind: kind of matrix in reports, a key of KINDS.
        source: source matrix; with `heads`, a part of `kv_b_proj`.
        stored: stored format of the source; that of the first expert if experts are stored one by one.
        shape: unquantized shape.
        quantization: quantization in the output; None if float.
        is_copied: whether the arrays are copied from the canonical form of the source without computation.
        is_indivisible: whether it stays float because its columns do not divide into groups.
        arrays: `weight`, and `scales` and `biases` if quantized.
    """

    path: str
    kind: str
    source: SourceMatrix
    stored: MatrixFormat
    shape: tuple[int, ...]
    quantization: Quantization | None
    is_copied: bool
    is_indivisible: bool
    arrays: tuple[ArraySpec, ...]

    @property
    def is_transposed(self) -> bool:
        """Whether each head is transposed: true for keys, false for values."""
        return self.source.heads is not None and self.source.heads[1] == 0

    @property
    def can_be_quantized(self) -> bool:
        """Whether the weight can be quantized: false for vectors and the router."""
        return _can_be_quantized(self.kind, self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.size_bytes for array in self.arrays)


@dataclass(frozen=True)
class ConvertedFile:
    """A file of the output: one layer, or the top."""

    name: str
    weights: tuple[WeightConversion, ...]

    def layout(self) -> FileLayout:
        """Return the layout of the file: large types first, so that each tensor is aligned, then by name."""
        arrays = [array for weight in self.weights for array in weight.arrays]
        arrays.sort(key=lambda array: (-DTYPE_BYTES[array.dtype], array.name))
        return lay_out((array.name, array.dtype, array.shape) for array in arrays)


@dataclass(frozen=True)
class ConversionPlan:
    """All files of the output.

    Args:
        files: layers in order, then the top.
        dtype: type of floats, as safetensors names it.
        vision_bytes: bytes of the vision part, which is left out.
    """

    files: tuple[ConvertedFile, ...]
    dtype: str
    vision_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.layout().size_bytes for file in self.files)

    @property
    def weights(self) -> list[WeightConversion]:
        """All weights, in the order of the files."""
        return [weight for file in self.files for weight in file.weights]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(weight.size_bytes for weight in self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight, scales and biases included."""
        return 8 * self.tensor_bytes / sum(math.prod(weight.shape) for weight in self.weights)

    def index(self) -> dict[str, Any]:
        """Return the contents of `model.safetensors.index.json`."""
        weight_map = {
            array.name: file.name for file in self.files for weight in file.weights for array in weight.arrays
        }
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}


KINDS = {
    "norms": "norm",
    "router": ".mlp.gate",
    "routed experts": ".switch_mlp.",
    "shared experts": ".shared_experts.",
    "dense MLP": ".mlp.",
    "attention": ".self_attn.",
    "embedding": "embed_tokens",
    "head": "lm_head",
}
"""Kind of matrix -> text in its path; the texts of the first two are at the end of the path. The first match counts."""


def plan_conversion(checkpoint: Checkpoint, options: ConvertOptions, has_prefix: bool) -> ConversionPlan:
    """Plan the files of the output.

    Args:
        checkpoint: tensors of the source.
        options: options of the user.
        has_prefix: whether the names start with `language_model.`, as in K2.5.

    Raises:
        UsageError: the options contradict each other or the source.
        WeightsError: missing or wrongly stored tensors.
    """
    config = checkpoint.config
    layers = [layer_entries(config, layer, checkpoint.layout) for layer in range(config.num_hidden_layers)]
    sources = [_distinct_sources(entries) for entries in [*layers, top_entries(config)]]
    targets = target_formats(checkpoint, options, [source for part in sources for source in part])
    prefix = TEXT_PREFIX if has_prefix else ""
    files = (
        ConvertedFile(
            f"model-{number:05}-of-{len(sources):05}.safetensors",
            tuple(weight for source in part for weight in _plan_source(checkpoint, source, targets, prefix)),
        )
        for number, part in enumerate(sources, start=1)
    )
    return ConversionPlan(tuple(files), targets.dtype, vision_bytes_of(checkpoint.tensors))


def _distinct_sources(entries: Sequence[TreeEntry]) -> list[SourceMatrix]:
    """Return the source matrices of entries of the canonical tree, whole and unfused."""
    return [replace(source, sharded_axes=(), blocks=0) for entry in entries for part in entry.parts for source in part]


def _plan_source(
    checkpoint: Checkpoint, source: SourceMatrix, targets: TargetFormats, prefix: str
) -> Iterator[WeightConversion]:
    """Yield the weight made of a source; a `kv_b_proj` that stays whole is yielded only for its first half."""
    stored = [checkpoint.matrix(path, source.suffix, source.shape) for path in source.paths]
    path = _stacked_path(source.paths[0])
    target = _target_quantization(stored, path, source.shape, targets)
    if source.heads is None:
        is_stack = path != source.paths[0]
        shape = (len(source.paths), *source.shape) if is_stack else source.shape
        yield _plan_weight(prefix + path, source, stored, shape, target, targets.dtype)
        return
    heads, first, end = source.heads
    # a copied `kv_b_proj` stays whole: it is packed by rows, and the transposed half would be packed differently
    if target is not None and target == stored[0].quantization:
        if first == 0:
            yield _plan_weight(prefix + path, replace(source, heads=None), stored, source.shape, target, targets.dtype)
        return
    latent, base = source.shape[-1], prefix + path.removesuffix("kv_b_proj")
    if first == 0:
        yield _plan_weight(base + "embed_q", source, stored, (heads, latent, end - first), target, targets.dtype)
    else:
        yield _plan_weight(base + "unembed_out", source, stored, (heads, end - first, latent), target, targets.dtype)


def _target_quantization(
    stored: Sequence[MatrixFormat], path: str, shape: tuple[int, ...], targets: TargetFormats
) -> Quantization | None:
    """Return the target quantization of a matrix; its columns may not divide into groups."""
    kind = _kind(path)
    if not _can_be_quantized(kind, shape):
        return None
    if not targets.keeps_quantization:
        return targets.experts if kind == "routed experts" else targets.others
    if len({matrix.quantization for matrix in stored}) > 1:
        raise WeightsError(
            f"the experts of `{path}` are quantized differently", hint="give them one format with --expert-bits"
        )
    return stored[0].quantization


def _can_be_quantized(kind: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and kind != "router"


def _plan_weight(
    path: str,
    source: SourceMatrix,
    stored: Sequence[MatrixFormat],
    shape: tuple[int, ...],
    target: Quantization | None,
    dtype: str,
) -> WeightConversion:
    """Return the conversion to a weight of this unquantized shape; a weight already in the target format is copied."""
    if source.suffix.endswith("e_score_correction_bias"):
        dtype = "F32"
    first = stored[0]
    is_uniform = len({matrix.kind for matrix in stored}) == 1 and source.heads is None
    is_copied = is_uniform and first.quantization == target and (target is not None or _is_stored_as(first, dtype))
    is_indivisible = target is not None and not is_copied and shape[-1] % target.group_size != 0
    quantization = None if is_indivisible else target
    arrays = _arrays(path, source.suffix, shape, quantization, dtype)
    if is_copied:
        arrays = tuple(replace(array, dtype=field.dtype) for array, field in zip(arrays, first.fields, strict=True))
    return WeightConversion(path, _kind(path), source, first, shape, quantization, is_copied, is_indivisible, arrays)


def _is_stored_as(matrix: MatrixFormat, dtype: str) -> bool:
    """Return whether a float matrix is stored in this type."""
    (field,) = matrix.fields
    return field.decode == "copy" and field.dtype == dtype


def _arrays(
    path: str, suffix: str, shape: tuple[int, ...], quantization: Quantization | None, dtype: str
) -> tuple[ArraySpec, ...]:
    if quantization is None:
        return (ArraySpec(path + suffix, dtype, shape),)
    *leading, columns = shape
    packed = (*leading, columns * quantization.bits // 32)
    groups = (*leading, columns // quantization.group_size)
    return (
        ArraySpec(f"{path}.weight", "U32", packed),
        ArraySpec(f"{path}.scales", dtype, groups),
        ArraySpec(f"{path}.biases", dtype, groups),
    )


def _stacked_path(path: str) -> str:
    """Return the path of the stack (`mlp.switch_mlp.up_proj`) for the path of an expert; other paths unchanged."""
    prefix, separator, rest = path.partition(".mlp.experts.")
    return f"{prefix}.mlp.switch_mlp.{rest.split('.', 1)[1]}" if separator else path


def _kind(path: str) -> str:
    is_at_end = {kind: path.endswith(KINDS[kind]) for kind in ("norms", "router")}
    return next(kind for kind, text in KINDS.items() if is_at_end.get(kind, text in path))
