"""Encode the images of prompts with the vision tower, in parts, so that steps of other sequences run in between.

Rank 0 alone has the tower. After each part it announces the result, and the other ranks wait for it on the CPU: so they
learn of an error, and no GPU waits for a late rank. Finished features go once to the ranks that embed tokens, a slice
at a time. All ranks choose the same images, because they run the same sequences and keep the same features.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kimi_mlx.engine.events import Encoded
from kimi_mlx.engine.feature_store import Features, FeatureStore
from kimi_mlx.engine.request import ImageInput
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.step_errors import encoding_error
from kimi_mlx.engine.step_runner import StepRunner
from kimi_mlx.errors import KimiMlxError, VisionError
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.vision import Encoding
from kimi_mlx.parallel.communicator import LeaderState
from kimi_mlx.parallel.group import sum_on_host

SLICE_BYTES = 8 << 20
"""Bytes of features that are sent at a time: 70 ms on a link of 1 Gbit/s."""

UNFINISHED, FINISHED, FAILED = range(3)
"""Results of a part that rank 0 announces."""


@dataclass
class EncodingJob:
    """An image that is being encoded, or whose features are being sent.

    Args:
        image: the image.
        encoding: state of the tower; None before the first part, and on ranks without the tower.
        features: (num_tokens, hidden_size), evaluated, once the encoding is finished; None on ranks without the tower.
        slices: bits of the features received so far; None until rank 0 has announced that the encoding is finished.
        num_done: number of parts computed and slices sent.
    """

    image: ImageInput
    encoding: Encoding | None = None
    features: mx.array | None = None
    slices: list[npt.NDArray[np.uint32]] | None = None
    num_done: int = 0


class ImageEncoder:
    """Encodes one image at a time, and puts its features into the store.

    Args:
        model: the model, or this rank's share of it.
        runner: runs the steps on this rank.
        store: store of the features.
        on_header: callback for the leader's state after each part.
    """

    def __init__(self, model: Model, runner: StepRunner, store: FeatureStore, on_header: Callable[[LeaderState], None]):
        self._tower = model.vision
        self._runner, self._store, self._on_header = runner, store, on_header
        self._dtype: mx.Dtype = model.layers[0]["input_layernorm"].dtype
        self._row_bytes = model.config.hidden_size * self._dtype.size
        # In a pipeline only rank 0 embeds tokens.
        self._group = None if runner.communicator is None or runner.pipeline is not None else runner.communicator.group
        self._job: EncodingJob | None = None

    def next_image(self, sequences: list[Sequence]) -> ImageInput | None:
        """Return the image to encode next; None if there is none, or if its features would not fit now.

        An image that no sequence needs any more is abandoned. First come the first images of all sequences, then their
        second ones, and so on.

        Args:
            sequences: running sequences.
        """
        if self._job is not None and _sequences_with(self._job.image, sequences):
            return self._job.image
        self._job = None
        missing = [
            (sequence.request.images.index(image), sequence.request_id, image)
            for sequence in sequences
            for image in sequence.pending_images
            if image.digest not in self._store
        ]
        if not missing:
            return None
        *_, image = min(missing, key=lambda item: item[:2])
        return image if self._store.has_room(image.num_tokens, self._ready_digests(sequences)) else None

    def step(self, image: ImageInput, sequences: list[Sequence]) -> Iterator[tuple[Sequence, Encoded | KimiMlxError]]:
        """Compute a part of an image, or send a slice of its features; yield pairs of a sequence and its event.

        An error ends the sequences that need the image.

        Args:
            image: image from next_image.
            sequences: running sequences.

        Raises:
            RingError: a rank is lost.
        """
        began = time.perf_counter()
        job = self._job = self._job or EncodingJob(image)
        waiting = _sequences_with(image, sequences)
        failure = self._compute_part(job) if job.slices is None else None
        result = FAILED if failure else FINISHED if job.features is not None else UNFINISHED
        result, state = self._runner.broadcast(result)
        self._on_header(state)
        if result == FAILED:
            self._job = None
            for sequence in waiting:
                yield sequence, failure or VisionError("rank 0 could not encode an image")
            return
        if job.slices is not None:
            self._send_slice(job)
        elif result == FINISHED:
            job.slices = []
        job.num_done += 1
        num_slices = self._num_slices(job)
        if job.slices is not None and len(job.slices) == num_slices:
            needed = {image.digest, *self._ready_digests(sequences)}
            self._store.put(image.digest, Features(image.num_tokens, self._rows(job)), needed)
            self._job = None
        num_parts = 0 if job.encoding is None else job.encoding.num_parts
        for sequence in waiting:
            sequence.encode_s += time.perf_counter() - began
            images = sequence.request.images
            number = next(at for at, other in enumerate(images, 1) if other.digest == image.digest)
            yield sequence, Encoded(number, len(images), job.num_done, num_parts + num_slices)

    def discard(self) -> None:
        """Abandon the image in progress; features that are finished stay."""
        self._job = None

    def _ready_digests(self, sequences: list[Sequence]) -> set[str]:
        """Return the digests of the images whose tokens can be computed: those before the first one without features.

        Only these must stay: the others come after an image that is not encoded yet and may need their space.
        """
        return {
            image.digest
            for sequence in sequences
            for image in itertools.takewhile(lambda image: image.digest in self._store, sequence.pending_images)
        }

    def _compute_part(self, job: EncodingJob) -> KimiMlxError | None:
        """Compute the next part on the rank with the tower; return the error if that fails."""
        if self._tower is None:
            return None
        image = job.image
        try:
            if image.patches is None:
                raise VisionError(f"{image} has no patches")
            if job.encoding is None:
                job.encoding = Encoding(self._tower, mx.array(image.patches), [image.grid])
            if job.encoding.step():
                job.features = job.encoding.features.astype(self._dtype)
                mx.eval(job.features)
        except (KimiMlxError, MemoryError, RuntimeError, ValueError) as error:
            return encoding_error(error)
        return None

    def _num_slices(self, job: EncodingJob) -> int:
        """Return the number of slices in which an image's features are sent."""
        return 0 if self._group is None else -(-job.image.num_tokens // self._rows_per_slice)

    @property
    def _rows_per_slice(self) -> int:
        return max(SLICE_BYTES // self._row_bytes, 1)

    def _send_slice(self, job: EncodingJob) -> None:
        """Send the next slice from rank 0 to the others; wait for it on the CPU."""
        assert self._group is not None
        assert job.slices is not None
        start = len(job.slices) * self._rows_per_slice
        stop = min(start + self._rows_per_slice, job.image.num_tokens)
        bits = np.zeros((stop - start, self._row_bytes // 4), np.uint32)
        if job.features is not None:
            bits = np.array(job.features[start:stop].view(mx.uint32))
        job.slices.append(sum_on_host(self._group, bits))  # all other ranks add zeros

    def _rows(self, job: EncodingJob) -> mx.array | None:
        """Return the features, evaluated; None on a rank that does not embed tokens."""
        if job.features is not None or not job.slices:
            return job.features
        rows = mx.array(np.concatenate(job.slices)).view(self._dtype)
        mx.eval(rows)
        return rows


def _sequences_with(image: ImageInput, sequences: list[Sequence]) -> list[Sequence]:
    """Return the sequences that still need an image."""
    return [
        sequence for sequence in sequences if any(pending.digest == image.digest for pending in sequence.pending_images)
    ]
