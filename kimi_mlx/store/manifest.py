"""Manifest of a shard store: origin, placement, and the files of one rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import write_atomically
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.parallel.placement import Placement
from kimi_mlx.weights.plan import LayerPlan

FORMAT = 2
"""Version of the format on disk; stores of other versions are refused."""

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Origin:
    """Source and version of the weights.

    Args:
        repository: `owner/name` on the hub, or the absolute path of a folder.
        commit: 40 hexadecimal digits; for a folder, a digest of its files.
    """

    repository: str
    commit: str


@dataclass(frozen=True)
class StoredArray:
    """Type (as safetensors names it) and shape of an array in a file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredWeight:
    """Arrays of a weight by name (`weight`, `scales`, `biases`), and its quantization; None for floats."""

    arrays: Mapping[str, StoredArray]
    quantization: Quantization | None


@dataclass(frozen=True)
class StoredFile:
    """File of one layer, of the top, or of the vision tower.

    Args:
        name: file name.
        size_bytes: file size.
        sha256: checksum of the file, in hexadecimal.
        entries: name in the canonical tree -> parts of the weight.
        latent_first: as in kimi_mlx.model.tree.LayerWeights.
        num_fused_shared: as there.
        first_expert: as there.
    """

    name: str
    size_bytes: int
    sha256: str
    entries: Mapping[str, tuple[StoredWeight, ...]]
    latent_first: bool
    num_fused_shared: int
    first_expert: int


@dataclass(frozen=True)
class Manifest:
    """Contents of a store. The manifest is written last, so a store with a manifest is complete.

    Args:
        origin: repository and commit.
        placement: shares of all ranks.
        rank: rank of the store.
        files: files of the layers in order, then of the top.
        vision: file of the vision tower; None without one.
        source_has_vision: whether the source has a vision tower; None if the model has none, or an earlier version
            built the store.
    """

    origin: Origin
    placement: Placement
    rank: int
    files: tuple[StoredFile, ...]
    vision: StoredFile | None = None
    source_has_vision: bool | None = None

    @property
    def all_files(self) -> tuple[StoredFile, ...]:
        """The files of the layers and the top, and that of the vision tower."""
        return self.files if self.vision is None else (*self.files, self.vision)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.all_files)

    def write(self, folder: Path) -> None:
        """Write the manifest into the store's folder, atomically."""
        value = {"format": FORMAT, **asdict(self), "placement": self.placement.to_dict()}
        for name in ("vision", "source_has_vision"):  # earlier versions wrote neither
            if value[name] is None:
                del value[name]
        write_atomically(folder / MANIFEST_NAME, json.dumps(value, indent=1).encode())


def stored_file(plan: LayerPlan, name: str, size_bytes: int, sha256: str) -> StoredFile:
    """Return the manifest's record of a finished file."""
    entries = {
        entry: tuple(
            StoredWeight({a.name: StoredArray(a.dtype, a.shape) for a in part.arrays}, part.quantization)
            for part in parts
        )
        for entry, parts in plan.entries.items()
    }
    return StoredFile(name, size_bytes, sha256, entries, plan.latent_first, plan.num_fused_shared, plan.first_expert)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a rank's store.

    Raises:
        WeightsError: the manifest is missing or damaged, or of another version.
    """
    path = folder / MANIFEST_NAME
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != FORMAT:
            raise WeightsError(
                f"the store `{folder}` has format {value['format']}, this version reads {FORMAT}",
                hint="build it again: remove the folder, then `kimi-mlx download`",
            )
        placement = Placement.from_dict(value["placement"])
        files = tuple(_file(item) for item in value["files"])
        vision = _file(value["vision"]) if "vision" in value else None
        source_has_vision = bool(value["source_has_vision"]) if "source_has_vision" in value else None
        return Manifest(Origin(**value["origin"]), placement, int(value["rank"]), files, vision, source_has_vision)
    except FileNotFoundError:
        raise WeightsError(
            f"there is no complete store in `{folder}`",
            hint="run the `kimi-mlx download` command with its `--ranks` again to resume",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"`{path}` cannot be read: {error!r}", hint="repair it with `kimi-mlx download --verify`"
        ) from error


def _file(value: Mapping[str, Any]) -> StoredFile:
    entries = {name: tuple(_weight(part) for part in parts) for name, parts in value["entries"].items()}
    return StoredFile(
        str(value["name"]),
        int(value["size_bytes"]),
        str(value["sha256"]),
        entries,
        bool(value["latent_first"]),
        int(value["num_fused_shared"]),
        int(value["first_expert"]),
    )


def _weight(value: Mapping[str, Any]) -> StoredWeight:
    arrays = {
        name: StoredArray(str(item["dtype"]), tuple(map(int, item["shape"]))) for name, item in value["arrays"].items()
    }
    quantization = value["quantization"]
    return StoredWeight(arrays, None if quantization is None else Quantization(**quantization))
