"""The tensors of a checkpoint and the stored format of each matrix. This module reads no tensor.

Four formats are supported and recognized by the names of the tensors: floats (`weight`), MLX's affine quantization
(`weight`, `scales`, `biases`), FP8 blocks (`weight`, `weight_scale_inv`), and the packed integers of compressed-tensors
(`weight_packed`, `weight_scale`, `weight_shape`). Each is described here as fields of the canonical form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.config_quantization import Fp8Blocks, PackedInts, Quantization
from kimi_mlx.model.names import (
    IGNORED_PREFIXES,
    IGNORED_SUFFIXES,
    TEXT_PREFIX,
    CheckpointLayout,
    TreeEntry,
    layer_entries,
    top_entries,
)
from kimi_mlx.weights.index import TensorInfo

FLOATS = ("F32", "F16", "BF16")
"""Types in which scales, norms and unquantized matrices may be stored."""

EXPERT_PATH = re.compile(r"\.mlp\.experts\.\d+\.")

MISMATCH_HINT = "`config.json` and the weights do not match: fetch both again"


@dataclass(frozen=True)
class MatrixField:
    """One array of a matrix in the canonical form, and its stored tensors.

    Args:
        name: `weight`, `scales` or `biases`.
        dtype: type in the canonical form, as safetensors names it.
        tensors: stored tensors: one, or FP8's weight and its scale factors.
        decode: `copy`, `biases` (made from packed integers' scales) or `fp8`.
        per: number of stored columns for every `values` columns of the matrix: bits for 32 in packed weights, 1 for
            group_size in scales and biases, else 1 for 1.
        values: see `per`.
    """

    name: str
    dtype: str
    tensors: tuple[str, ...]
    decode: str = "copy"
    per: int = 1
    values: int = 1


@dataclass(frozen=True)
class MatrixFormat:
    """Stored format of one matrix of the checkpoint.

    Args:
        fields: `weight`, and `scales` and `biases` if quantized.
        quantization: quantization in the canonical form; None if float.
    """

    fields: tuple[MatrixField, ...]
    quantization: Quantization | None

    @property
    def kind(self) -> tuple[tuple[str, ...], Quantization | None]:
        """Types and quantization; two matrices can be joined only if theirs are equal."""
        return tuple(field.dtype for field in self.fields), self.quantization


class Checkpoint:
    """The tensors of a text model, by their names without `language_model.`.

    Args:
        config: configuration of the model.
        table: tensors of all files.
        location: folder or repository, for messages.
        fp8_dtype: type to which FP8 is converted: `F32` is exact; stores use the compute dtype of the model.
    """

    def __init__(self, config: ModelConfig, table: Mapping[str, TensorInfo], location: str, fp8_dtype: str = "F32"):
        self.config = config
        self.location = location
        self.fp8_dtype = fp8_dtype
        self.tensors = {name.removeprefix(TEXT_PREFIX): info for name, info in table.items()}
        self.layout = CheckpointLayout(self.has_matrix, self.quantization)

    def has_matrix(self, name: str) -> bool:
        """Return whether there is a matrix of this float name, such as `lm_head.weight`, in any format."""
        return name in self.tensors or name.removesuffix(".weight") + ".weight_packed" in self.tensors

    def quantization(self, path: str) -> Quantization | None:
        """Return the quantization of the matrix at `path` in the canonical form."""
        if f"{path}.weight_packed" in self.tensors:
            packed = self._packed_ints(path)
            return Quantization(packed.bits, packed.group_size)
        if f"{path}.scales" not in self.tensors:
            return None
        quantization = self.config.quantization_of(path)
        if path not in self.config.quantization_overrides:  # it may name the stack of separate experts
            quantization = self.config.quantization_of(EXPERT_PATH.sub(".mlp.switch_mlp.", path))
        if quantization is None:
            raise WeightsError(
                f"`{path}` has scales, but `config.json` has no `quantization`", hint="fetch `config.json` again"
            )
        return quantization

    def tensors_of(self, path: str, suffix: str = ".weight") -> list[str]:
        """Return the full names of the tensors of a matrix."""
        if suffix != ".weight":
            return [path + suffix]
        if f"{path}.weight_packed" in self.tensors:
            kinds: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
        elif f"{path}.weight_scale_inv" in self.tensors:
            kinds = ("weight", "weight_scale_inv")
        elif f"{path}.scales" in self.tensors:
            kinds = ("weight", "scales", "biases")
        else:
            kinds = ("weight",)
        return [f"{path}.{kind}" for kind in kinds]

    def matrix(self, path: str, suffix: str, shape: tuple[int, ...]) -> MatrixFormat:
        """Return the stored format of the matrix at `path`.

        Args:
            path: name without suffix.
            suffix: `.weight`, or the suffix of the router's bias.
            shape: shape of the unquantized matrix according to the configuration.

        Raises:
            WeightsError: a shape or type does not match the configuration.
        """
        names = self.tensors_of(path, suffix)
        if names[0].endswith(".weight_packed"):
            return self._packed(names, path, shape)
        if len(names) == 2:
            return self._fp8(names, shape)
        if len(names) == 1:
            self._check(names[0], FLOATS, shape)
            return MatrixFormat((MatrixField("weight", self.tensors[names[0]].dtype, (names[0],)),), None)
        return self._affine(names, path, shape)

    def _affine(self, names: list[str], path: str, shape: tuple[int, ...]) -> MatrixFormat:
        quantization = self.quantization(path)
        assert quantization is not None
        bits, size = quantization.bits, quantization.group_size
        format_note = f" at {bits} bits in groups of {size}"
        packs = ((bits, 32), (1, size), (1, size))
        for name, (per, values) in zip(names, packs, strict=True):
            self._check(name, ("U32",) if values == 32 and per == bits else FLOATS, shape, per, values, format_note)
        fields = (
            MatrixField(name.rpartition(".")[2], self.tensors[name].dtype, (name,), "copy", per, values)
            for name, (per, values) in zip(names, packs, strict=True)
        )
        return MatrixFormat(tuple(fields), quantization)

    def _packed(self, names: list[str], path: str, shape: tuple[int, ...]) -> MatrixFormat:
        packed = self._packed_ints(path)
        bits, size = packed.bits, packed.group_size
        format_note = f" at {bits} bits in groups of {size}"
        words, scale = names[:2]
        self._check(words, ("I32",), shape, bits, 32, format_note)
        self._check(scale, FLOATS, shape, 1, size, format_note)
        dtype = self.tensors[scale].dtype
        fields = (
            MatrixField("weight", "U32", (words,), "copy", bits, 32),
            MatrixField("scales", dtype, (scale,), "copy", 1, size),
            MatrixField("biases", dtype, (scale,), "biases", 1, size),
        )
        return MatrixFormat(fields, Quantization(bits, size))

    def _packed_ints(self, path: str) -> PackedInts:
        compression = self.config.compression
        if not isinstance(compression, PackedInts):
            raise WeightsError(
                f"`{path}` is packed by compressed-tensors, but `config.json` has no `quantization_config` for it",
                hint="fetch `config.json` again",
            )
        return compression

    def _fp8(self, names: list[str], shape: tuple[int, ...]) -> MatrixFormat:
        blocks = self.config.compression
        if not isinstance(blocks, Fp8Blocks):
            raise WeightsError(
                f"`{names[0]}` is stored as FP8, but `config.json` has no `weight_block_size`",
                hint="fetch `config.json` again",
            )
        self._check(names[0], ("F8_E4M3",), shape)
        *leading, rows, columns = shape
        grid = (*leading, -(-rows // blocks.block_rows), -(-columns // blocks.block_columns))
        self._check(names[1], ("F32",), grid)
        return MatrixFormat((MatrixField("weight", self.fp8_dtype, tuple(names), "fp8"),), None)

    def _check(
        self,
        name: str,
        dtypes: tuple[str, ...],
        shape: tuple[int, ...],
        per: int = 1,
        values: int = 1,
        format_note: str = "",
    ) -> None:
        """Check the stored type and shape of a tensor; `format_note` describes the quantization in messages."""
        info = self.tensors.get(name)
        if info is None:
            raise WeightsError(f"`{self.location}` lacks the tensor `{name}`", hint="finish the download")
        label = f"tensor `{name}` in `{info.file}`"
        if info.dtype not in dtypes:
            expected_type = dtypes[0] if len(dtypes) == 1 else "a float type"
            raise WeightsError(f"{label} has type {info.dtype}, not {expected_type}", hint=MISMATCH_HINT)
        *leading, columns = shape
        expected = (*leading, columns * per // values)
        if info.shape != expected or columns * per % values:
            raise WeightsError(
                f"{label} has shape {info.shape}; `config.json` requires {expected}{format_note}", hint=MISMATCH_HINT
            )

    def check_names(self) -> None:
        """Raise WeightsError if a tensor is missing or unknown."""
        expected = {
            name
            for entry in self._entries()
            for part in entry.parts
            for source in part
            for path in source.paths
            for name in self.tensors_of(path, source.suffix)
        }
        present = {name for name in self.tensors if not is_ignored(name, self.config)}
        if missing := sorted(expected - present):
            raise WeightsError(
                f"`{self.location}` lacks {_format_names(missing)}",
                hint="finish the download, or fetch `config.json` again",
            )
        if unknown := sorted(present - expected):
            raise WeightsError(
                f"`{self.location}` has {_format_names(unknown)}, which this model does not use",
                hint="the checkpoint is of another architecture or layout",
            )

    def _entries(self) -> list[TreeEntry]:
        entries = top_entries(self.config)
        for layer in range(self.config.num_hidden_layers):
            entries += layer_entries(self.config, layer, self.layout)
        return entries


def vision_bytes_of(table: Mapping[str, TensorInfo]) -> int:
    """Return the bytes of the vision part, which is not loaded."""
    return sum(info.size_bytes for name, info in table.items() if name.startswith(IGNORED_PREFIXES))


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Return whether a text model does not use a tensor: vision, rotary buffers, multi-token prediction layers."""
    if name.startswith(IGNORED_PREFIXES) or name.endswith(IGNORED_SUFFIXES):
        return True
    parts = name.split(".")
    is_layer = parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit()
    return is_layer and int(parts[2]) >= config.num_hidden_layers


def _format_names(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return f"{len(names)} tensors, first {shown}" if len(names) > 5 else f"the tensor{'s' * (len(names) > 1)} {shown}"
