"""The tensors of a checkpoint, and whether they are those of the model. No tensor is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import DecoderConfig, ModelConfig
from kimi_mlx.model.names import IGNORED_SUFFIXES, TEXT_PREFIX, CheckpointLayout, TreeEntry, layer_entries, top_entries
from kimi_mlx.model.vision_names import is_vision, vision_entries
from kimi_mlx.units import is_short_number
from kimi_mlx.weights.header import TensorInfo
from kimi_mlx.weights.index import read_index
from kimi_mlx.weights.stored_matrices import StoredMatrices


class CheckpointTensors(ABC):
    """The tensors of a model or of a draft model, by their canonical names.

    Args:
        config: its configuration.
        tensors: tensors of all files.
        location: folder or repository, for messages.
        fp8_dtype: type to which FP8 is decoded: `F32` is exact; stores use the compute dtype of the model.
    """

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, TensorInfo], location: str, fp8_dtype: str = "F32"):
        self.tensors, self.location, self.compression = tensors, location, config.compression
        self.matrices = StoredMatrices(config, tensors, location, fp8_dtype)
        self.layout = CheckpointLayout(self.matrices.has, self.matrices.quantization)

    def check_names(self) -> None:
        """Raise WeightsError if a tensor is missing or unknown."""
        expected = {
            name
            for entry in self.entries()
            for part in entry.parts
            for source in part
            for name in self.matrices.tensor_names(source)
        }
        present = {name for name in self.tensors if not self.is_ignored(name)}
        if missing := sorted(expected - present):
            raise WeightsError(
                f"`{self.location}` lacks {_format_names(missing)}",
                hint="finish the download, or fetch `config.json` again",
            )
        if unknown := sorted(present - expected):
            raise WeightsError(
                f"`{self.location}` has {_format_names(unknown)} in `{self.tensors[unknown[0]].file.name}`, which this "
                "model does not use",
                hint="the checkpoint is of another architecture or layout",
            )

    @abstractmethod
    def is_ignored(self, name: str) -> bool:
        """Return whether the model does not use a tensor."""

    @abstractmethod
    def entries(self) -> list[TreeEntry]:
        """Return all entries of the model."""


class Checkpoint(CheckpointTensors):
    """The tensors of a model, by their names without `language_model.`.

    Args:
        config: configuration of the model; tensors of a vision tower are ignored if it has no `vision`.
        table: tensors of all files.
        location: see CheckpointTensors.
        fp8_dtype: see there.
    """

    def __init__(self, config: ModelConfig, table: Mapping[str, TensorInfo], location: str, fp8_dtype: str = "F32"):
        tensors = {name.removeprefix(TEXT_PREFIX): info for name, info in table.items()}
        super().__init__(config, tensors, location, fp8_dtype)
        self.config = config
        self.has_vision = config.vision is not None and any(map(is_vision, self.tensors))

    def is_ignored(self, name: str) -> bool:
        """Return whether the model does not use a tensor.

        That is true of rotary buffers, multi-token prediction layers, and a vision tower that is not loaded.
        """
        if name.endswith(IGNORED_SUFFIXES) or (is_vision(name) and not self.has_vision):
            return True
        parts = name.split(".")
        is_layer = parts[:2] == ["model", "layers"] and len(parts) > 2 and is_short_number(parts[2])
        return is_layer and int(parts[2]) >= self.config.num_hidden_layers

    def entries(self) -> list[TreeEntry]:
        """Return the entries of the top, of the vision tower and of all layers."""
        entries = top_entries(self.config)
        if self.config.vision is not None and self.has_vision:
            entries += vision_entries(self.config.vision, self.layout)
        for layer in range(self.config.num_hidden_layers):
            entries += layer_entries(self.config, layer, self.layout)
        return entries


def read_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    """Read the headers of the checkpoint in a folder.

    Raises:
        WeightsError: files are missing or broken, or tensors are missing or unknown.
    """
    checkpoint = Checkpoint(config, read_index(folder), str(folder))
    checkpoint.check_names()
    return checkpoint


def vision_bytes_of(table: Mapping[str, TensorInfo]) -> int:
    """Return the bytes of the vision tower and its projector."""
    return sum(info.size_bytes for name, info in table.items() if is_vision(name))


def _format_names(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return f"{len(names)} tensors, first {shown}" if len(names) > 5 else f"the tensor{'s' * (len(names) > 1)} {shown}"
