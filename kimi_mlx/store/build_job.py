"""Description of a build of shard stores: source, placement and the plan of each file. Equal in all processes."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from kimi_mlx.model.vision_names import is_vision
from kimi_mlx.parallel.placement import Placement
from kimi_mlx.store.sources import CheckpointSource
from kimi_mlx.store.store_folders import placement_folder
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.file_layout import layer_layout
from kimi_mlx.weights.layer_plan import plan_layer, plan_top, plan_vision
from kimi_mlx.weights.plan import LayerPlan


class BuildJob:
    """Description of one build.

    Store files are numbered by layer; the top (embedding, final norm, head) follows the last layer, and the vision
    tower the top. Source files are numbered by their position in `files`: those with only vision tensors are the last,
    so that the numbers in the journal of a store without a tower stay valid when it is added.

    Args:
        source: source of the checkpoint's files.
        checkpoint: table of the checkpoint's tensors.
        placement: shares of all ranks.
        stores: root folder of all stores.
        source_has_vision: as in Manifest.
    """

    def __init__(
        self,
        source: CheckpointSource,
        checkpoint: Checkpoint,
        placement: Placement,
        stores: Path,
        source_has_vision: bool | None = None,
    ):
        self.source, self.checkpoint, self.placement = source, checkpoint, placement
        self.source_has_vision = source_has_vision
        self.folder = placement_folder(stores, source.contents.origin, placement)
        headers = source.contents.headers
        self.files = sorted(source.contents.sizes, key=lambda file: (_is_vision_only(headers[file]), file))
        self.num_layers = checkpoint.config.num_hidden_layers
        self.plan = lru_cache(maxsize=8 * placement.world_size)(self._plan)
        self._sources_of_file = self._find_sources_of_file()

    def size_bytes(self, rank: int) -> int:
        """Return the size of the files of one rank's store."""
        plans = (self._plan(rank, file) for file in range(self.num_layers + 2))
        return sum(layer_layout(plan).size_bytes for plan in plans if plan.entries)

    def sources_of_file(self, rank: int) -> list[frozenset[int]]:
        """Return for each file of a rank's store the numbers of the source files that it is made from."""
        share = self.placement.shares[rank]
        own_files = set(range(share.layers.start, share.layers.stop))
        if len(share.embed_rows) or len(share.vocab_rows):
            own_files.add(self.num_layers)
        sources_of_file = self._sources_of_file[: self.num_layers + 1]
        if share.has_vision and self.checkpoint.has_vision:
            own_files.add(self.num_layers + 1)
            sources_of_file = self._sources_of_file
        return [sources if file in own_files else frozenset() for file, sources in enumerate(sources_of_file)]

    def _plan(self, rank: int, file: int) -> LayerPlan:
        share = self.placement.shares[rank]
        if file == self.num_layers + 1:
            return plan_vision(self.checkpoint, share)
        if file == self.num_layers:
            return plan_top(self.checkpoint, share)
        return plan_layer(self.checkpoint, file, share)

    def _find_sources_of_file(self) -> list[frozenset[int]]:
        """Return the source files of each layer, the top and the vision tower, for a rank with the whole model."""
        numbers = {name: number for number, name in enumerate(self.files)}
        sources: list[set[int]] = [set() for _ in range(self.num_layers + 2)]
        for name, info in self.checkpoint.tensors.items():
            if not self.checkpoint.is_ignored(name):
                parts = name.split(".")
                is_layer = parts[:2] == ["model", "layers"]
                other = self.num_layers + is_vision(name)
                sources[int(parts[2]) if is_layer else other].add(numbers[info.file.name])
        return [frozenset(numbers) for numbers in sources]


def _is_vision_only(header: Collection[str]) -> bool:
    """Return whether a file has tensors of the vision tower, and no others."""
    return bool(header) and all(map(is_vision, header))
