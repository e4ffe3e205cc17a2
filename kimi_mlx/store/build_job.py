"""Description of a build of shard stores: source, placement and the plan of each file. Equal in all processes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kimi_mlx.parallel.placement import Placement
from kimi_mlx.store.sources import CheckpointSource
from kimi_mlx.store.store_folders import placement_folder
from kimi_mlx.weights.checkpoint import Checkpoint, is_ignored
from kimi_mlx.weights.layer_plan import plan_layer, plan_top
from kimi_mlx.weights.plan import LayerPlan


class BuildJob:
    """Description of one build.

    Store files are numbered by layer; the top (embedding, final norm, head) follows the last layer. Source files are
    numbered by their position in `files`.

    Args:
        source: source of the checkpoint's files.
        checkpoint: table of the checkpoint's tensors.
        placement: shares of all ranks.
        stores: root folder of all stores.
    """

    def __init__(self, source: CheckpointSource, checkpoint: Checkpoint, placement: Placement, stores: Path):
        self.source, self.checkpoint, self.placement = source, checkpoint, placement
        self.folder = placement_folder(stores, source.contents.origin, placement)
        self.files = sorted(source.contents.sizes)
        self.num_layers = checkpoint.config.num_hidden_layers
        self.plan = lru_cache(maxsize=8 * placement.world_size)(self._plan)
        self._sources_of_file = self._find_sources_of_file()

    def size_bytes(self, rank: int) -> int:
        """Return the size of one rank's store."""
        return sum(self._plan(rank, file).size_bytes for file in range(self.num_layers + 1))

    def sources_of_file(self, rank: int) -> list[frozenset[int]]:
        """Return for each file of a rank's store the numbers of the source files that it is made from."""
        share = self.placement.shares[rank]
        own_files = set(range(share.layers.start, share.layers.stop))
        if len(share.embed_rows) or len(share.vocab_rows):
            own_files.add(self.num_layers)
        return [sources if file in own_files else frozenset() for file, sources in enumerate(self._sources_of_file)]

    def _plan(self, rank: int, file: int) -> LayerPlan:
        share = self.placement.shares[rank]
        if file == self.num_layers:
            return plan_top(self.checkpoint, share)
        return plan_layer(self.checkpoint, file, share)

    def _find_sources_of_file(self) -> list[frozenset[int]]:
        """Return the source files of each layer and of the top, for a rank that holds the whole model."""
        numbers = {name: number for number, name in enumerate(self.files)}
        sources: list[set[int]] = [set() for _ in range(self.num_layers + 1)]
        for name, info in self.checkpoint.tensors.items():
            if not is_ignored(name, self.checkpoint.config):
                parts = name.split(".")
                layer = int(parts[2]) if parts[:2] == ["model", "layers"] else self.num_layers
                sources[layer].add(numbers[info.file.name])
        return [frozenset(numbers) for numbers in sources]
