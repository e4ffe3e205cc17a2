"""Find the stored format of each matrix of a checkpoint, and check its tensors. No tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import DecoderConfig
from kimi_mlx.model.config_quantization import Fp8Blocks, PackedInts, Quantization
from kimi_mlx.model.names import SourceMatrix
from kimi_mlx.weights.header import TensorInfo
from kimi_mlx.weights.matrix_format import FLOATS, NOT_PACKED, MatrixField, MatrixFormat, Packing, tensor_names

EXPERT_PATH = re.compile(r"\.mlp\.experts\.\d+\.")

MISMATCH_HINT = "`config.json` and the weights do not match: fetch both again"


class StoredMatrices:
    """The matrices of a checkpoint.

    Args:
        config: configuration of the model.
        tensors: tensors by name.
        location: folder or repository, for messages.
        fp8_dtype: type to which FP8 is decoded.
    """

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, TensorInfo], location: str, fp8_dtype: str):
        self._config, self._tensors = config, tensors
        self._location, self._fp8_dtype = location, fp8_dtype

    def has(self, name: str) -> bool:
        """Return whether there is a matrix of this float name, such as `lm_head.weight`, in any format."""
        return name in self._tensors or name.removesuffix(".weight") + ".weight_packed" in self._tensors

    def tensor_names(self, source: SourceMatrix) -> list[str]:
        """Return the names of all tensors of a source matrix."""
        return [name for path in source.paths for name in tensor_names(self._tensors, path, source.suffix)]

    def quantization(self, path: str) -> Quantization | None:
        """Return the quantization of the matrix at `path` in the canonical form; None if it is float."""
        names = tensor_names(self._tensors, path)
        if names[0].endswith(".weight_packed"):
            packed = self._packed_ints(path)
            return Quantization(packed.bits, packed.group_size)
        return self._mlx_quantization(path, names) if f"{path}.scales" in names else None

    def format_of(self, path: str, source: SourceMatrix) -> MatrixFormat:
        """Return the stored format of one matrix of a source.

        A weight that the model needs as floats (a norm, the router) is dequantized if it is stored quantized.

        Args:
            path: one of the source's paths.
            source: source matrix, with the shape that the configuration requires.

        Raises:
            WeightsError: a tensor is missing, or its shape or type does not match the configuration.
        """
        names, shape = tensor_names(self._tensors, path, source.suffix), source.shape
        if len(names) == 1 and source.kernel is not None:
            return self._convolution(names[0], shape[0], source.kernel)
        if len(names) == 1:
            self._check(names[0], FLOATS, shape)
            return MatrixFormat((MatrixField("weight", self._tensors[names[0]].dtype, names),), None)
        if names[1].endswith(".weight_scale_inv"):
            return self._fp8(names, shape)
        is_packed = names[0].endswith(".weight_packed")
        matrix = self._packed(names, path, shape) if is_packed else self._mlx(names, path, shape)
        return matrix.dequantized() if source.is_float else matrix

    def _mlx_quantization(self, path: str, names: tuple[str, ...]) -> Quantization:
        config = self._config
        quantization = config.quantization_of(path)
        if path not in config.quantization_overrides:  # it may name the stack of separate experts
            quantization = config.quantization_of(EXPERT_PATH.sub(".mlp.switch_mlp.", path))
        if quantization is None:
            raise WeightsError(
                f"`{path}` has scales, but `config.json` has no `quantization`", hint="fetch `config.json` again"
            )
        has_biases = f"{path}.biases" in names
        if has_biases == (quantization.mode == "affine"):
            return quantization
        if not has_biases:
            raise WeightsError(f"`{self._location}` lacks the tensor `{path}.biases`", hint="finish the download")
        raise WeightsError(
            f"`{path}` has biases, but `config.json` gives it the mode `{quantization.mode}`, which has none",
            hint=MISMATCH_HINT,
        )

    def _mlx(self, names: tuple[str, ...], path: str, shape: tuple[int, ...]) -> MatrixFormat:
        quantization = self._mlx_quantization(path, names)
        scale_types = FLOATS if quantization.mode == "affine" else ("U8",)
        fields = [self._field(names[0], ("U32",), shape, quantization, Packing(quantization.bits, 32))]
        per_group = Packing(1, quantization.group_size)
        fields += [self._field(name, scale_types, shape, quantization, per_group) for name in names[1:]]
        return MatrixFormat(tuple(fields), quantization)

    def _field(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], quantization: Quantization, packing: Packing
    ) -> MatrixField:
        """Return the field of a tensor that has the canonical form already."""
        self._check(name, dtypes, shape, packing, quantization)
        return MatrixField(name.rpartition(".")[2], self._tensors[name].dtype, (name,), "copy", packing)

    def _packed(self, names: tuple[str, ...], path: str, shape: tuple[int, ...]) -> MatrixFormat:
        packed = self._packed_ints(path)
        quantization = Quantization(packed.bits, packed.group_size)
        words, scale = names[:2]
        in_words, per_group = Packing(packed.bits, 32), Packing(1, packed.group_size)
        self._check(words, ("I32",), shape, in_words, quantization)
        self._check(scale, FLOATS, shape, per_group, quantization)
        dtype = self._tensors[scale].dtype
        fields = (
            MatrixField("weight", "U32", (words,), "copy", in_words),
            MatrixField("scales", dtype, (scale,), "copy", per_group),
            MatrixField("biases", dtype, (scale,), "biases", per_group),
        )
        return MatrixFormat(fields, quantization)

    def _convolution(self, name: str, rows: int, kernel: tuple[int, int, int]) -> MatrixFormat:
        """Return the format of a float convolution: with four axes, channels second or last, or as a matrix."""
        channels, height, width = kernel
        stored = self._tensors[name].shape if name in self._tensors else ()
        last, matrix = (rows, height, width, channels), (rows, channels * height * width)
        shape = stored if stored in (last, matrix) else (rows, *kernel)
        self._check(name, FLOATS, shape)
        is_last = shape == last != (rows, *kernel)
        field = MatrixField("weight", self._tensors[name].dtype, (name,), "channels_last" if is_last else "copy")
        return MatrixFormat((field,), None)

    def _packed_ints(self, path: str) -> PackedInts:
        compression = self._config.compression
        if not isinstance(compression, PackedInts):
            raise WeightsError(
                f"`{path}` is packed by compressed-tensors, but `config.json` has no supported `quantization_config`",
                hint="fetch `config.json` again",
            )
        return compression

    def _fp8(self, names: tuple[str, ...], shape: tuple[int, ...]) -> MatrixFormat:
        blocks = self._config.compression
        if not isinstance(blocks, Fp8Blocks):
            raise WeightsError(
                f"`{names[0]}` is stored as FP8, but `config.json` has no `weight_block_size`",
                hint="fetch `config.json` again",
            )
        self._check(names[0], ("F8_E4M3", "U8"), shape)  # MLX loads the first and saves it as the second
        if len(shape) == 1:
            raise WeightsError(f"`{names[0]}` is a vector stored as FP8 blocks", hint=MISMATCH_HINT)
        *leading, rows, columns = shape
        grid = (*leading, -(-rows // blocks.block_rows), -(-columns // blocks.block_columns))
        self._check(names[1], ("F32",), grid)
        return MatrixFormat((MatrixField("weight", self._fp8_dtype, names, "fp8"),), None)

    def _check(
        self,
        name: str,
        dtypes: tuple[str, ...],
        shape: tuple[int, ...],
        packing: Packing = NOT_PACKED,
        quantization: Quantization | None = None,
    ) -> None:
        """Check the stored type and shape of a tensor.

        Args:
            name: name of the tensor.
            dtypes: allowed types.
            shape: shape of the unquantized matrix.
            packing: packing of the columns.
            quantization: quantization, for the message.
        """
        info = self._tensors.get(name)
        if info is None:
            raise WeightsError(f"`{self._location}` lacks the tensor `{name}`", hint="finish the download")
        label = f"tensor `{name}` in `{info.file}`"
        if info.dtype not in dtypes:
            expected_type = "a float type" if dtypes == FLOATS else dtypes[0]
            raise WeightsError(f"{label} has type {info.dtype}, not {expected_type}", hint=MISMATCH_HINT)
        *leading, columns = shape
        expected = (*leading, packing.stored_columns(columns))
        if info.shape != expected or not packing.divides(columns):
            note = f" at {quantization.bits} bits in groups of {quantization.group_size}" if quantization else ""
            raise WeightsError(
                f"{label} has shape {info.shape}; `config.json` requires {expected}{note}", hint=MISMATCH_HINT
            )
