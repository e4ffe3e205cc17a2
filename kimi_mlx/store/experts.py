"""Sources of the routed experts in a rank's store, to read single experts."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.store.manifest import Manifest, StoredExperts, StoredFile
from kimi_mlx.store.store_folders import rank_folder, repair_hint
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES, ExpertArray
from kimi_mlx.weights.expert_source import ExpertSource, record_source, stack_source
from kimi_mlx.weights.expert_tag import ExpertTag
from kimi_mlx.weights.file_layout import RECORDS_NAME
from kimi_mlx.weights.header import TensorInfo, read_header
from kimi_mlx.weights.plan import array_name


def expert_sources(folder: Path, manifest: Manifest) -> list[ExpertSource]:
    """Return the sources of all layers with routed experts.

    Args:
        folder: folder of the placement.
        manifest: manifest of the rank, from open_manifest.

    Raises:
        WeightsError: a file is unreadable or differs from the manifest.
    """
    sources: list[ExpertSource] = []
    for layer, file in enumerate(manifest.files):
        path, hint = rank_folder(folder, manifest.rank) / file.name, repair_hint(manifest)
        if file.experts is not None:
            sources.append(_record_source(layer, path, file, file.experts, expert_tag(manifest, layer), hint))
        elif file.has_stacks:
            sources.append(_stack_source(layer, path, file, hint))
    return sources


def expert_tag(manifest: Manifest, layer: int) -> ExpertTag:
    """Return the tags of a layer's records."""
    return ExpertTag(layer, manifest.rank, manifest.placement.digest, manifest.origin.commit)


def _record_source(
    layer: int, path: Path, file: StoredFile, experts: StoredExperts, tag: ExpertTag, hint: str
) -> ExpertSource:
    table = read_header(path).get(RECORDS_NAME)
    if table is None or (table.dtype, table.shape) != ("U8", (experts.num_experts, experts.record.record_bytes)):
        raise WeightsError(f"the store's file `{path}` does not have the experts that its manifest lists", hint=hint)
    return record_source(layer, file.first_expert, table, experts.arrays, experts.record, tag, hint)


def _stack_source(layer: int, path: Path, file: StoredFile, hint: str) -> ExpertSource:
    tensors = read_header(path)
    stacks: list[tuple[ExpertArray, TensorInfo]] = []
    num_members = 0
    for matrix, entry in EXPERT_ENTRIES.items():
        parts = file.entries[entry]
        for number, part in enumerate(parts):
            for field, stored in part.arrays.items():
                table = tensors.get(array_name(entry, number, len(parts), field))
                if table is None or (table.dtype, table.shape) != (stored.dtype, stored.shape):
                    raise WeightsError(
                        f"the store's file `{path}` does not have the `{entry}` that its manifest lists", hint=hint
                    )
                num_members, rows, columns = stored.shape
                array = ExpertArray(matrix, number, field, stored.dtype, (rows, columns), part.quantization)
                stacks.append((array, table))
    return stack_source(layer, file.first_expert, num_members - file.num_fused_shared, stacks, hint)
