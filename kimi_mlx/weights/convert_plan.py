"""Plan a conversion to MLX's quantized layout: the files of the output, and the source of each weight.

As for loading, kimi_mlx.weights.layer_plan plans the weights, but each is a whole matrix, not fused with others, and
has the quantization in which it is written. The output has the layout of mlx-lm: experts stacked as `switch_mlp`,
`kv_b_proj` split into `embed_q` and `unembed_out`, K2.5's prefix kept. A vision tower is copied as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.names import TEXT_PREFIX, SourceMatrix, TreeEntry, layer_entries, top_entries
from kimi_mlx.model.vision_names import is_vision, vision_entries
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.convert_options import ConvertOptions, TargetFormats, target_formats
from kimi_mlx.weights.converted_files import ConversionPlan, ConvertedFile, ConvertedWeight
from kimi_mlx.weights.layer_plan import plan_source
from kimi_mlx.weights.plan import ArrayPlan, WeightPlan
from kimi_mlx.weights.presets import fitting_format

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

VISION_KIND = "vision tower"
"""Kind of all matrices and vectors of the vision tower and its projector."""

VISION_FILE = "model-vision.safetensors"
"""File of the vision tower: one of its own, so that the names of the others do not depend on it."""


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
    sources = [_whole_sources(entries) for entries in [*layers, top_entries(config)]]
    moe_layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    end_layers = {moe_layers[0], moe_layers[-1]} if moe_layers else set[int]()
    targets = target_formats(checkpoint, options, [source for part in sources for source in part])
    prefix = TEXT_PREFIX if has_prefix else ""
    files = [
        ConvertedFile(
            f"model-{number:05}-of-{len(sources):05}.safetensors",
            tuple(
                weight
                for source in part
                for weight in _plan_source(checkpoint, source, targets, prefix, is_end=number - 1 in end_layers)
            ),
        )
        for number, part in enumerate(sources, start=1)
    ]
    has_vision = config.vision is not None and checkpoint.has_vision
    if config.vision is not None and has_vision:
        tower = _whole_sources(vision_entries(config.vision, checkpoint.layout))
        files.append(ConvertedFile(VISION_FILE, tuple(_plan_copy(checkpoint, source) for source in tower)))
    lacks_vision = not has_vision and (config.vision is not None or any(map(is_vision, checkpoint.tensors)))
    return ConversionPlan(tuple(files), targets.dtype, has_vision, lacks_vision)


def _whole_sources(entries: Sequence[TreeEntry]) -> list[SourceMatrix]:
    """Return the source matrices of entries of the canonical tree, whole and unfused."""
    return [replace(source, sharded_axes=(), blocks=0) for entry in entries for part in entry.parts for source in part]


def _plan_copy(checkpoint: Checkpoint, source: SourceMatrix) -> ConvertedWeight:
    """Plan a matrix of the vision tower, which keeps its name, format and stored axes."""
    (stored,) = plan_source(checkpoint, source)
    if source.kernel is not None:
        stored = replace(stored, arrays=tuple(_with_stored_axes(checkpoint, array) for array in stored.arrays))
    (path,) = source.paths
    is_quantized = stored.quantization is not None
    return ConvertedWeight(
        path, source.suffix, VISION_KIND, source.shape, (stored,), stored, can_be_quantized=is_quantized
    )


def _with_stored_axes(checkpoint: Checkpoint, array: ArrayPlan) -> ArrayPlan:
    """Return the plan of a convolution that is written with the axes of its source."""
    (copy,) = array.copies
    if copy.field.decode == "dequantize":
        return array
    shape = checkpoint.tensors[copy.field.tensors[0]].shape
    return replace(array, shape=shape, copies=(replace(copy, field=replace(copy.field, decode="copy")),))


def _plan_source(
    checkpoint: Checkpoint, source: SourceMatrix, targets: TargetFormats, prefix: str, is_end: bool
) -> Iterator[ConvertedWeight]:
    """Yield the weight made from a source. An unsplit `kv_b_proj` is yielded for the first of its two halves.

    Args:
        checkpoint: tensors of the source.
        source: the source matrix.
        targets: formats of the output.
        prefix: prefix of the names.
        is_end: whether it is of the first or the last layer with experts.
    """
    path = _stacked_path(source.paths[0])
    stored = plan_source(checkpoint, source)
    target = _target_quantization(stored, source, path, targets, is_end)
    is_stack = path != source.paths[0]
    output = _Output(prefix + path, source, (len(source.paths), *source.shape) if is_stack else source.shape)
    if source.heads is not None:
        # a copied `kv_b_proj` is not split: it is packed by rows, and the transposed half would be packed differently
        is_unsplit, is_first = target is not None and target == stored[0].quantization, source.heads[1] == 0
        if is_unsplit and not is_first:
            return
        if is_unsplit:
            output = replace(output, source=replace(source, heads=None))
            stored = plan_source(checkpoint, output.source)
        else:
            output = _half_of_kv_b(output)
    if targets.preset is not None and target is not None and target != stored[0].quantization:
        target = fitting_format(target, output.shape[-1]) or target
    is_float32 = targets.preset is not None and _kind(path) == "router"
    yield _plan_weight(output, stored, target, "F32" if is_float32 else targets.dtype)


@dataclass(frozen=True)
class _Output:
    """A weight of the output: full path, source matrix and unquantized shape; keys of `kv_b_proj` are transposed."""

    path: str
    source: SourceMatrix
    shape: tuple[int, ...]
    is_transposed: bool = False


def _half_of_kv_b(output: _Output) -> _Output:
    """Return the keys (heads, latent, nope) or the values (heads, v, latent) of `kv_b_proj`."""
    assert output.source.heads is not None
    heads, first, end = output.source.heads
    latent, base = output.shape[-1], output.path.removesuffix("kv_b_proj")
    if first == 0:
        return _Output(base + "embed_q", output.source, (heads, latent, end - first), is_transposed=True)
    return _Output(base + "unembed_out", output.source, (heads, end - first, latent))


def _target_quantization(
    stored: Sequence[WeightPlan], source: SourceMatrix, path: str, targets: TargetFormats, is_end: bool
) -> Quantization | None:
    """Return the target quantization of a matrix; its columns may not divide into groups."""
    if source.is_float:
        return None
    if targets.preset is not None:
        is_expert = _kind(path) == "routed experts"
        is_down = path.endswith(".down_proj")
        target = targets.preset.expert_format(is_down, is_end) if is_expert else targets.preset.rest
        present = {plan.quantization for plan in stored}
        first = stored[0].quantization
        # more bits than the source has add nothing, and quantizing it again to the same bits loses
        return first if first is not None and len(present) == 1 and first.bits <= target.bits else target
    if not targets.keeps_quantization:
        return targets.experts if _kind(path) == "routed experts" else targets.others
    if len({plan.quantization for plan in stored}) > 1:
        raise WeightsError(
            f"the experts of `{path}` are quantized differently", hint="give them one format with --expert-bits"
        )
    return stored[0].quantization


def _plan_weight(
    output: _Output, stored: Sequence[WeightPlan], target: Quantization | None, dtype: str
) -> ConvertedWeight:
    """Plan a weight of the output; a weight already in the target format is copied."""
    source, shape = output.source, output.shape
    if source.suffix.endswith("e_score_correction_bias"):
        dtype = "F32"
    plan = stored[0]
    is_copied = (
        len(stored) == 1
        and source.heads is None
        and plan.quantization == target
        and (target is not None or _is_stored_as(plan, dtype))
    )
    is_indivisible = target is not None and not is_copied and shape[-1] % target.group_size != 0
    if not is_copied:
        plan = _requantized(shape, None if is_indivisible else target, dtype)
    return ConvertedWeight(
        output.path,
        source.suffix,
        _kind(output.path),
        shape,
        tuple(stored),
        plan,
        can_be_quantized=not source.is_float,
        is_transposed=output.is_transposed,
        is_indivisible=is_indivisible,
    )


def _is_stored_as(plan: WeightPlan, dtype: str) -> bool:
    """Return whether a float matrix is stored in this type."""
    (array,) = plan.arrays
    return array.dtype == dtype and array.copies[0].field.decode == "copy"


def _requantized(shape: tuple[int, ...], quantization: Quantization | None, dtype: str) -> WeightPlan:
    """Return the plan of a weight whose arrays are computed, in floats or in affine mode."""
    assert quantization is None or quantization.mode == "affine"
    if quantization is None:
        return WeightPlan((ArrayPlan("weight", dtype, shape),), None)
    *leading, columns = shape
    packed = (*leading, columns * quantization.bits // 32)
    groups = (*leading, columns // quantization.group_size)
    arrays = (
        ArrayPlan("weight", "U32", packed),
        ArrayPlan("scales", dtype, groups),
        ArrayPlan("biases", dtype, groups),
    )
    return WeightPlan(arrays, quantization)


def _stacked_path(path: str) -> str:
    """Return the path of the stack (`mlp.switch_mlp.up_proj`) for the path of an expert; other paths unchanged."""
    prefix, separator, rest = path.partition(".mlp.experts.")
    return f"{prefix}.mlp.switch_mlp.{rest.split('.', 1)[1]}" if separator else path


def _kind(path: str) -> str:
    is_at_end = {kind: path.endswith(KINDS[kind]) for kind in ("norms", "router")}
    return next(kind for kind, text in KINDS.items() if is_at_end.get(kind, text in path))
