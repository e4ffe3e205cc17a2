"""The plan of a conversion to MLX's affine layout: which files, which tensors in them, and what each is made of.

The output is what mlx-lm writes: experts stacked as `switch_mlp`, `kv_b_proj` split into `embed_q` and `unembed_out`,
K2.5's prefix kept and its vision part left out. Pure: headers and configuration only, no tensor is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.names import TEXT_PREFIX, SourceMatrix, TreeEntry, layer_entries, top_entries
from kimi_mlx.weights.checkpoint import Checkpoint, MatrixFormat, vision_bytes_of
from kimi_mlx.weights.file_layout import FileLayout, lay_out
from kimi_mlx.weights.index import DTYPE_BYTES

BFLOAT16_BITS = 16
"""In options: floats in bfloat16 instead of a quantization."""
DEFAULT_BITS, DEFAULT_GROUP_SIZE = 4, 64
BITS_BESIDE_EXPERTS = 8
"""Of everything else, where bits are given for routed experts alone."""

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED_TYPES = {name: stored for stored, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class ConvertOptions:
    """What was asked for; None where nothing was said.

    Args:
        bits: of every matrix that can be quantized, or BFLOAT16_BITS.
        expert_bits: of routed experts, or BFLOAT16_BITS.
        group_size: of whatever is quantized anew.
    """

    bits: int | None = None
    expert_bits: int | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class TargetFormats:
    """What matrices become.

    Args:
        keeps: that each stays as it is stored; the next two say nothing then.
        experts: of routed experts; None for floats.
        others: of all other matrices.
        dtype: of floats and of new scales, in safetensors' words.
    """

    keeps: bool
    experts: Quantization | None
    others: Quantization | None
    dtype: str


@dataclass(frozen=True)
class ArraySpec:
    """A tensor of the output: its full name, its type in safetensors' words, its shape."""

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
        path: its name without suffix, as mlx-lm's module is called.
        kind: what it is, for people.
        source: what it is made of; with `heads` a part of `kv_b_proj`.
        stored: how that is stored; of the first expert, if they are stored one by one.
        shape: unquantized.
        quantization: in the output; None if float.
        is_copied: nothing is computed: the arrays are those of the source, in the canonical form.
        is_indivisible: it was to be quantized, but its columns do not divide into groups.
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
        """Whether each head is turned, rows to columns: keys, but not values."""
        return self.source.heads is not None and self.source.heads[1] == 0

    @property
    def can_be_quantized(self) -> bool:
        """False for vectors and the router."""
        return _can_be_quantized(self.kind, self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.size_bytes for array in self.arrays)


@dataclass(frozen=True)
class ConvertedFile:
    """One layer, or the top."""

    name: str
    outputs: tuple[WeightConversion, ...]

    def layout(self) -> FileLayout:
        """The layout: large types first, so that each tensor is aligned, then by name."""
        arrays = [array for output in self.outputs for array in output.arrays]
        arrays.sort(key=lambda array: (-DTYPE_BYTES[array.dtype], array.name))
        return lay_out((array.name, array.dtype, array.shape) for array in arrays)


@dataclass(frozen=True)
class SummaryRow:
    """What becomes of all matrices of one kind: how they are stored, what they become, bytes of that."""

    kind: str
    source: str
    target: str
    size_bytes: int


@dataclass(frozen=True)
class ConversionPlan:
    """All files of the output.

    Args:
        files: the layers in their order, then the top.
        dtype: of floats, in safetensors' words.
        vision_bytes: of the part that is left out.
    """

    files: tuple[ConvertedFile, ...]
    dtype: str
    vision_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.layout().size_bytes for file in self.files)

    @property
    def outputs(self) -> list[WeightConversion]:
        """All of them, in the order of the files."""
        return [output for file in self.files for output in file.outputs]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.size_bytes for output in self.outputs)

    @property
    def bits_per_weight(self) -> float:
        """Scales and biases included."""
        return 8 * self.tensor_bytes / sum(math.prod(output.shape) for output in self.outputs)

    def index(self) -> dict[str, Any]:
        """What `model.safetensors.index.json` holds."""
        weight_map = {
            array.name: file.name for file in self.files for output in file.outputs for array in output.arrays
        }
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}

    def summary(self) -> list[SummaryRow]:
        """What is done to each kind of matrix, the largest first."""
        sizes: Counter[tuple[str, str, str]] = Counter()
        for output in self.outputs:
            sizes[output.kind, _stored_in_words(output.stored), _target_in_words(output)] += output.size_bytes
        return [SummaryRow(*words, size) for words, size in sizes.most_common()]

    def notes(self) -> list[str]:
        """What the user should know of the result."""
        notes: list[str] = []
        if again := [output for output in self.outputs if _is_quantized_again(output)]:
            kinds = ", ".join(dict.fromkeys(output.kind for output in again))
            notes.append(f"quantized a second time, which is less exact than once, from floats: {kinds}")
        if floats := [output for output in self.outputs if output.is_indivisible]:
            notes.append(
                f"{len(floats)} matrices stay {DTYPE_NAMES[self.dtype]}, as their columns do not divide into groups: "
                f"first `{floats[0].path}` with {floats[0].shape[-1]} columns"
            )
        if self.vision_bytes:
            notes.append("the vision part is left out")
        return notes

    def quantization_block(self) -> dict[str, Any] | None:
        """`quantization` of config.json: what most matrices have, and each path that differs; None without any."""
        matrices = [output for output in self.outputs if output.can_be_quantized]
        counts = Counter(output.quantization for output in matrices if output.quantization is not None)
        if not counts:
            return None
        default = counts.most_common(1)[0][0]
        block: dict[str, Any] = {"group_size": default.group_size, "bits": default.bits, "mode": "affine"}
        for output in matrices:
            own = output.quantization
            if own != default:
                value = {"group_size": own.group_size, "bits": own.bits} if own else False
                block |= dict.fromkeys(_module_paths(output), value)
        return block


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
"""Kinds of matrices, and what is in their paths; of the first two at the end. The first that fits counts."""


def plan_conversion(checkpoint: Checkpoint, options: ConvertOptions, has_prefix: bool) -> ConversionPlan:
    """Plan the files of the output.

    Args:
        checkpoint: the source.
        options: what was asked for.
        has_prefix: whether the names get `language_model.`, as K2.5's have.

    Raises:
        UsageError: options that contradict each other or the source.
        WeightsError: missing or wrongly stored tensors.
    """
    config = checkpoint.config
    layers = [layer_entries(config, layer, checkpoint.layout) for layer in range(config.num_hidden_layers)]
    sources = [_distinct_sources(entries) for entries in [*layers, top_entries(config)]]
    targets = _targets(checkpoint, options, [source for part in sources for source in part])
    prefix = TEXT_PREFIX if has_prefix else ""
    files = (
        ConvertedFile(
            f"model-{number:05}-of-{len(sources):05}.safetensors",
            tuple(output for source in part for output in _outputs(checkpoint, source, targets, prefix)),
        )
        for number, part in enumerate(sources, start=1)
    )
    return ConversionPlan(tuple(files), targets.dtype, vision_bytes_of(checkpoint.tensors))


def converted_config(raw: Mapping[str, Any], plan: ConversionPlan) -> dict[str, Any]:
    """`config.json` of the output: the source's, without what no longer holds, with MLX's `quantization`.

    Gone are the formats of the source, `auto_map` (code files, which are not copied), the vision part, and the number
    of layers that predict further tokens.
    """
    text = raw.get("text_config")
    config = _cleaned(raw, plan)
    if isinstance(text, Mapping):
        config["text_config"] = _cleaned(text, plan)
    elif "torch_dtype" not in config:
        config["torch_dtype"] = DTYPE_NAMES[plan.dtype]
    block = plan.quantization_block()
    if block is not None:
        config |= {"quantization": block, "quantization_config": block}
    return config


GONE = ("quantization", "quantization_config", "compression_config", "auto_map", "vision_config")


def _cleaned(raw: Mapping[str, Any], plan: ConversionPlan) -> dict[str, Any]:
    config = {name: value for name, value in raw.items() if name not in GONE}
    for name in ("torch_dtype", "dtype"):
        if config.get(name) is not None:
            config[name] = DTYPE_NAMES[plan.dtype]
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    return config


def _distinct_sources(entries: Sequence[TreeEntry]) -> list[SourceMatrix]:
    """What the entries of the canonical tree are made of, unfused: cuts and blocks are of no concern here."""
    return [replace(source, cuts=(), blocks=0) for entry in entries for part in entry.parts for source in part]


def _targets(checkpoint: Checkpoint, options: ConvertOptions, sources: Sequence[SourceMatrix]) -> TargetFormats:
    """What the options mean for this source."""
    stored = {source: checkpoint.quantization(source.paths[0]) for source in sources if source.suffix == ".weight"}
    dtype = STORED_TYPES.get(checkpoint.config.dtype, "BF16")
    bits, expert_bits = options.bits, options.expert_bits
    if bits is None and expert_bits is None and any(stored.values()):
        if options.group_size is not None:
            raise UsageError(
                f"--group-size {options.group_size} alone changes nothing: `{checkpoint.where}` is quantized already",
                hint="add --bits to quantize it anew",
            )
        return TargetFormats(True, None, None, dtype)
    if bits is None:
        bits = DEFAULT_BITS if expert_bits is None else BITS_BESIDE_EXPERTS
    if expert_bits is None:
        expert_bits = bits
    if BFLOAT16_BITS in (bits, expert_bits):
        dtype = "BF16"
    if bits == expert_bits == BFLOAT16_BITS and options.group_size is not None:
        raise UsageError(
            f"--group-size {options.group_size} says nothing of bfloat16", hint="leave it out, or choose other --bits"
        )
    is_fine = any(q is not None and q.group_size == 32 for source, q in stored.items() if _is_expert(source))
    group_size = options.group_size or (32 if is_fine else DEFAULT_GROUP_SIZE)
    return TargetFormats(False, _quantization(expert_bits, group_size), _quantization(bits, group_size), dtype)


def _quantization(bits: int, group_size: int) -> Quantization | None:
    return None if bits == BFLOAT16_BITS else Quantization(bits, group_size)


def _is_expert(source: SourceMatrix) -> bool:
    return ".mlp.experts." in source.paths[0] or ".switch_mlp." in source.paths[0]


def _outputs(
    checkpoint: Checkpoint, source: SourceMatrix, targets: TargetFormats, prefix: str
) -> Iterator[WeightConversion]:
    """What becomes of one source: itself; of `kv_b_proj` a half, or with its first half all of it."""
    stored = [checkpoint.matrix(path, source.suffix, source.shape) for path in source.paths]
    path = _stacked_path(source.paths[0])
    wanted = _wanted(stored, path, source.shape, targets)
    if source.heads is None:
        is_stack = path != source.paths[0]
        shape = (len(source.paths), *source.shape) if is_stack else source.shape
        yield _output(prefix + path, source, stored, shape, wanted, targets.dtype)
        return
    heads, first, end = source.heads
    if wanted is not None and wanted == stored[0].quantization:  # its words are by rows: the turned half has others
        if first == 0:
            yield _output(prefix + path, replace(source, heads=None), stored, source.shape, wanted, targets.dtype)
        return
    latent, before = source.shape[-1], prefix + path.removesuffix("kv_b_proj")
    if first == 0:
        yield _output(before + "embed_q", source, stored, (heads, latent, end - first), wanted, targets.dtype)
    else:
        yield _output(before + "unembed_out", source, stored, (heads, end - first, latent), wanted, targets.dtype)


def _wanted(
    stored: Sequence[MatrixFormat], path: str, shape: tuple[int, ...], targets: TargetFormats
) -> Quantization | None:
    """What a matrix is to become, if its columns allow it."""
    kind = _kind(path)
    if not _can_be_quantized(kind, shape):
        return None
    if not targets.keeps:
        return targets.experts if kind == "routed experts" else targets.others
    if len({matrix.quantization for matrix in stored}) > 1:
        raise WeightsError(
            f"the experts of `{path}` are quantized differently", hint="quantize them alike with --expert-bits"
        )
    return stored[0].quantization


def _can_be_quantized(kind: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and kind != "router"


def _output(
    path: str,
    source: SourceMatrix,
    stored: Sequence[MatrixFormat],
    shape: tuple[int, ...],
    wanted: Quantization | None,
    dtype: str,
) -> WeightConversion:
    """An output of this unquantized shape; copied if all of it is stored already as it is to be."""
    if source.suffix.endswith("e_score_correction_bias"):
        dtype = "F32"
    first = stored[0]
    is_alike = len({matrix.kind for matrix in stored}) == 1 and source.heads is None
    is_copied = is_alike and first.quantization == wanted and (wanted is not None or _is_plain(first, dtype))
    is_indivisible = wanted is not None and not is_copied and shape[-1] % wanted.group_size != 0
    quantization = None if is_indivisible else wanted
    arrays = _arrays(path, source.suffix, shape, quantization, dtype)
    if is_copied:
        arrays = tuple(replace(array, dtype=field.dtype) for array, field in zip(arrays, first.fields, strict=True))
    return WeightConversion(path, _kind(path), source, first, shape, quantization, is_copied, is_indivisible, arrays)


def _is_plain(matrix: MatrixFormat, dtype: str) -> bool:
    """Whether a float matrix is stored in this type."""
    (field,) = matrix.fields
    return field.decode == "copy" and field.dtype == dtype


def _arrays(
    path: str, suffix: str, shape: tuple[int, ...], quantization: Quantization | None, dtype: str
) -> tuple[ArraySpec, ...]:
    if quantization is None:
        return (ArraySpec(path + suffix, dtype, shape),)
    *leading, columns = shape
    words = (*leading, columns * quantization.bits // 32)
    groups = (*leading, columns // quantization.group_size)
    return (
        ArraySpec(f"{path}.weight", "U32", words),
        ArraySpec(f"{path}.scales", dtype, groups),
        ArraySpec(f"{path}.biases", dtype, groups),
    )


def _stacked_path(path: str) -> str:
    """What a stack of experts is called after the path of its first: `mlp.switch_mlp.up_proj`."""
    before, found, after = path.partition(".mlp.experts.")
    return f"{before}.mlp.switch_mlp.{after.split('.', 1)[1]}" if found else path


def _kind(path: str) -> str:
    is_at_end = {kind: path.endswith(KINDS[kind]) for kind in ("norms", "router")}
    return next(kind for kind, mark in KINDS.items() if is_at_end.get(kind, mark in path))


def _module_paths(output: WeightConversion) -> list[str]:
    """Under which names readers look for the quantization: mlx-lm splits a whole `kv_b_proj` by itself."""
    before, found, _ = output.path.partition("kv_b_proj")
    return [output.path, f"{before}embed_q", f"{before}unembed_out"] if found else [output.path]


def _is_quantized_again(output: WeightConversion) -> bool:
    return not output.is_copied and output.stored.quantization is not None and output.quantization is not None


def _stored_in_words(matrix: MatrixFormat) -> str:
    if matrix.fields[0].decode == "fp8":
        return "FP8"
    if any(field.decode == "biases" for field in matrix.fields):
        assert matrix.quantization is not None
        return f"INT{matrix.quantization.bits}, groups of {matrix.quantization.group_size}"
    return _in_words(matrix.quantization, matrix.fields[0].dtype)


def _target_in_words(output: WeightConversion) -> str:
    words = _in_words(output.quantization, output.arrays[0].dtype)
    is_unchanged = output.is_copied or (output.quantization is None and words == _stored_in_words(output.stored))
    return words + ", unchanged" * is_unchanged


def _in_words(quantization: Quantization | None, dtype: str) -> str:
    if quantization is None:
        return DTYPE_NAMES[dtype]
    return f"{quantization.bits} bits, groups of {quantization.group_size}"
