"""The routed experts of a rank's store, as sources from which they are read one by one."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.store.manifest import Manifest, StoredFile
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.store.stores import repair_hint
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES, ExpertArray
from kimi_mlx.weights.expert_source import ExpertSource, stack_source
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
        if EXPERT_ENTRIES["down"] in file.entries:
            path = rank_folder(folder, manifest.rank) / file.name
            sources.append(_stack_source(layer, path, file, repair_hint(manifest)))
    return sources


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
