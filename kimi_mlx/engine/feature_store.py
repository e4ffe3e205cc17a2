"""Features of images by digest, least recently used first, within a budget.

All decisions depend only on digests, sizes and the order of calls. Ranks make the same calls, so they always keep the
features of the same images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mlx.core as mx

from kimi_mlx.engine.request import ImageInput
from kimi_mlx.model.image_rows import ImageRows


@dataclass(frozen=True)
class Features:
    """Features of one image.

    Args:
        num_tokens: number of features, one for each placeholder token.
        rows: (num_tokens, hidden_size), evaluated; None on a rank that does not embed tokens.
    """

    num_tokens: int
    rows: mx.array | None


class FeatureStore:
    """Features of the images that prompts need, and of earlier images as long as all fit the budget.

    Args:
        budget_tokens: number of features of all images together.
    """

    def __init__(self, budget_tokens: int):
        self._budget_tokens = budget_tokens
        self._features: OrderedDict[str, Features] = OrderedDict()
        """Least recently used first."""

    def __contains__(self, digest: str) -> bool:
        return digest in self._features

    @property
    def num_tokens(self) -> int:
        """Number of features of all images."""
        return sum(features.num_tokens for features in self._features.values())

    def has_room(self, num_tokens: int, needed: Collection[str]) -> bool:
        """Return whether features fit in addition to those that are needed; if none are needed, any number fits.

        Args:
            num_tokens: number of features.
            needed: digests of images that must stay.
        """
        taken = sum(features.num_tokens for digest, features in self._features.items() if digest in needed)
        return not taken or taken + num_tokens <= self._budget_tokens

    def put(self, digest: str, features: Features, needed: Collection[str]) -> None:
        """Keep features; evict the least recently used ones that are not needed until all fit the budget."""
        self._features[digest] = features
        excess = self.num_tokens - self._budget_tokens
        for other in [other for other in self._features if other not in needed]:
            if excess <= 0:
                return
            excess -= self._features.pop(other).num_tokens

    def ready_length(self, images: Sequence[ImageInput], length: int) -> int:
        """Return the number of leading tokens of a prompt that can be computed: those before an image without features.

        Args:
            images: images that are not computed yet, by position.
            length: number of tokens of the prompt.
        """
        return next((image.start for image in images if image.digest not in self._features), length)

    def rows_between(self, images: Sequence[ImageInput], start: int, stop: int) -> tuple[ImageRows, ...]:
        """Return the features of a chunk of a prompt, with positions from its start. They count as used.

        Args:
            images: images of the prompt that are not computed yet, by position; those in the chunk have features.
            start: position of the chunk's first token.
            stop: position after its last token.
        """
        found: list[ImageRows] = []
        for image in images:
            first, end = max(image.start, start), min(image.stop, stop)
            if first < end:
                self._features.move_to_end(image.digest)
                rows = self._features[image.digest].rows
                if rows is not None:
                    found.append(ImageRows(first - start, rows[first - image.start : end - image.start]))
        return tuple(found)
