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
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES, ExpertArray, RecordLayout, split_experts
from kimi_mlx.weights.expert_tag import TAG_BYTES
from kimi_mlx.weights.file_layout import records_layout
from kimi_mlx.weights.plan import LayerPlan

FORMAT = 3
"""Version of the format on disk that is written."""

READABLE_FORMATS = (2, FORMAT)
"""Versions that can be read. Version 2 has no records of experts."""

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
class StoredExperts:
    """Routed experts of a file, as records.

    Args:
        num_experts: number of experts.
        arrays: arrays of an expert.
        record: layout of a record.
    """

    num_experts: int
    arrays: tuple[ExpertArray, ...]
    record: RecordLayout


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
        experts: routed experts as records; None if there are none, or if they are in stacks, as in earlier versions.
    """

    name: str
    size_bytes: int
    sha256: str
    entries: Mapping[str, tuple[StoredWeight, ...]]
    latent_first: bool
    num_fused_shared: int
    first_expert: int
    experts: StoredExperts | None = None

    @property
    def has_stacks(self) -> bool:
        """Whether the file has routed experts that are in stacks."""
        return self.experts is None and EXPERT_ENTRIES["down"] in self.entries


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
        for file in value["files"]:
            if file["experts"] is None:
                del file["experts"]
        value.get("vision", {}).pop("experts", None)
        write_atomically(folder / MANIFEST_NAME, json.dumps(value, indent=1).encode())


def stored_file(plan: LayerPlan, name: str, size_bytes: int, sha256: str, has_records: bool = True) -> StoredFile:
    """Return the entry of a finished file in the manifest.

    Args:
        plan: arrays of the file.
        name: file name.
        size_bytes: size of the file.
        sha256: checksum of the file.
        has_records: whether routed experts are stored as records.
    """
    records = records_layout(plan) if has_records else None
    rest = plan if records is None else split_experts(plan)[0]
    entries = {
        entry: tuple(
            StoredWeight({a.name: StoredArray(a.dtype, a.shape) for a in part.arrays}, part.quantization)
            for part in parts
        )
        for entry, parts in rest.entries.items()
    }
    experts = None if records is None else StoredExperts(records.num_experts, records.arrays, records.record)
    shared, first = plan.num_fused_shared, plan.first_expert
    return StoredFile(name, size_bytes, sha256, entries, plan.latent_first, shared, first, experts)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a rank's store.

    Raises:
        WeightsError: the manifest is missing or damaged, or of another version.
    """
    path = folder / MANIFEST_NAME
    try:
        value = json.loads(path.read_bytes())
        if value["format"] not in READABLE_FORMATS:
            raise WeightsError(
                f"the store `{folder}` has format {value['format']}, this version reads "
                f"{READABLE_FORMATS[0]} to {FORMAT}",
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
        _experts(value["experts"]) if "experts" in value else None,
    )


def _experts(value: Mapping[str, Any]) -> StoredExperts:
    arrays = tuple(_expert_array(item) for item in value["arrays"])
    record = RecordLayout(tuple(map(int, value["record"]["offsets"])), int(value["record"]["record_bytes"]))
    ends = (*record.offsets[1:], record.record_bytes - TAG_BYTES)
    if any(start + array.size_bytes > end for start, array, end in zip(record.offsets, arrays, ends, strict=True)):
        raise ValueError("arrays of an expert overlap")
    return StoredExperts(int(value["num_experts"]), arrays, record)


def _expert_array(value: Mapping[str, Any]) -> ExpertArray:
    rows, columns = map(int, value["shape"])
    if value["matrix"] not in EXPERT_ENTRIES:
        raise ValueError(f"unknown matrix {value['matrix']!r}")
    quantization = _quantization(value["quantization"])
    return ExpertArray(
        value["matrix"], int(value["part"]), str(value["field"]), str(value["dtype"]), (rows, columns), quantization
    )


def _weight(value: Mapping[str, Any]) -> StoredWeight:
    arrays = {
        name: StoredArray(str(item["dtype"]), tuple(map(int, item["shape"]))) for name, item in value["arrays"].items()
    }
    return StoredWeight(arrays, _quantization(value["quantization"]))


def _quantization(value: Mapping[str, Any] | None) -> Quantization | None:
    return None if value is None else Quantization(**value)
