"""Requests to the engine."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from kimi_mlx.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FIRST_IMAGE_KEY = 1 << 62
"""Keys of images are integers from this up, below 2**63: above every token id, and signed 64-bit integers hold them."""

DIGEST = re.compile(r"[0-9a-f]{32}")

SAMPLING_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (0, 2**31),
    "min_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
    "seed": (0, 2**63),
}
"""Lowest and highest value of each sampling parameter. A `top_p` of 0 is refused, too."""

WHOLE_NUMBERS = ("top_k", "seed")
"""Sampling parameters that are integers."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: temperature; from 0, which takes the most likely token, to 2.
        top_p: total probability of the most likely tokens to keep; 1 keeps all.
        top_k: number of most likely tokens to keep; 0 keeps all.
        min_p: minimum probability, as a fraction of that of the most likely token.
        seed: seed of the random numbers; None for a random one.
        frequency_penalty: number subtracted from the logit of a token for each time that the answer has it.
        presence_penalty: number subtracted from the logits of all tokens of the answer.
        repetition_penalty: divisor of the logits of all tokens of prompt and answer, if they are positive; negative
            ones are multiplied by it.

    Raises:
        UsageError: a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, (low, high) in SAMPLING_RANGES.items():
            value = getattr(self, name)
            kind = int if name in WHOLE_NUMBERS else (int, float)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not (is_number and low <= value <= high) and (name, value) != ("seed", None):
                raise UsageError(
                    f"{name} is {value!r}, but must be {'a whole number ' * (kind is int)}between {low} and {high}"
                )
        if self.top_p == 0:
            raise UsageError("top_p is 0, which leaves no token", hint="for greedy decoding use --temperature 0")


@dataclass(frozen=True)
class ImageInput:
    """An image in a prompt, or a chunk of a video: its features replace the embeddings of its placeholder tokens.

    Args:
        start: position of its first placeholder token in the prompt.
        num_tokens: number of its placeholder tokens.
        grid: number of frames, and of rows and columns of patches: (t, h, w).
        digest: hash of patches and grid, 32 hexadecimal digits. Images with equal digests are the same image.
        patches: uint8 (t * h * w, 3, 14, 14), in the order of the grid; None where they are not needed, on every rank
            but rank 0.

    Raises:
        UsageError: a value is invalid, or there are not as many patches as the grid has.
    """

    start: int
    num_tokens: int
    grid: tuple[int, int, int]
    digest: str
    patches: npt.NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "grid", tuple(map(operator.index, self.grid)))
        if self.start < 0 or self.num_tokens < 1 or len(self.grid) != 3 or min(self.grid) < 1:
            raise UsageError(f"{self} has an invalid number")
        if not DIGEST.fullmatch(self.digest):
            raise UsageError(f"the digest of an image is {self.digest!r}, not 32 hexadecimal digits")
        if self.patches is not None:
            shape, count = tuple(self.patches.shape), math.prod(self.grid)
            if shape[:2] != (count, 3) or len(shape) != 4 or self.patches.dtype != "uint8":
                raise UsageError(
                    f"the patches of an image are {shape} of {self.patches.dtype}, "
                    f"but its grid {self.grid} needs {count} patches of 3 colours in uint8"
                )

    @property
    def stop(self) -> int:
        """Position after its last placeholder token."""
        return self.start + self.num_tokens

    @property
    def key(self) -> int:
        """Number that stands for each of its placeholder tokens in the keys of caches: 62 bits of the digest."""
        return FIRST_IMAGE_KEY | int(self.digest[:16], 16) >> 2

    def to_dict(self) -> dict[str, Any]:
        """Return the image as JSON, without its patches."""
        return {"start": self.start, "num_tokens": self.num_tokens, "grid": self.grid, "digest": self.digest}


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids, at least one.
        max_tokens: maximum number of new tokens; None for the rest of the context. 0 only computes the prompt.
        sampling: sampling parameters.
        stop_ids: tokens that end the answer; they are returned, too.
        logit_bias: pairs of a token id and a number that is added to its logit.
        top_logprobs: number of most likely tokens to return, with log probabilities, for each token; None returns no
            log probabilities at all.
        grammar: grammar of the answer, as written by kimi_mlx.text.grammar; None for no constraint.
        answered: number of tokens at the end of the prompt that already belong to the answer.
        images: images of the prompt, by position.
        client: client of the request, any text; waiting requests of different clients take turns.
        min_tokens: number of tokens of the answer, those in `answered` included, before a stop token is allowed. If the
            grammar allows only stop tokens, the answer ends earlier.
        prompt_logprobs: number of most likely tokens to return, with log probabilities, for each token of the prompt,
            except the first; None returns no log probabilities of the prompt.
        next_logprob: position of the first token of the prompt whose log probability is returned, at least 1.

    Raises:
        UsageError: token ids or max_tokens are not integers, or images overlap or end after the prompt.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    grammar: str | None = None
    answered: int = 0
    images: tuple[ImageInput, ...] = ()
    client: str = ""
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    next_logprob: int = 1

    def __post_init__(self) -> None:
        """Check types and positions; convert other integers (numpy's) to int."""
        try:
            object.__setattr__(self, "prompt", tuple(map(operator.index, self.prompt)))
            if self.max_tokens is not None:
                object.__setattr__(self, "max_tokens", operator.index(self.max_tokens))
        except TypeError as error:
            raise UsageError(f"token ids and max_tokens must be whole numbers: {error}") from error
        limits = [*(image.start for image in self.images[1:]), len(self.prompt)]
        for image, limit in zip(self.images, limits, strict=False):  # without images the end is left over
            if image.stop > limit:
                raise UsageError(f"{image} ends at token {image.stop}, but the next image or the end is at {limit}")

    def cache_key(self) -> list[int]:
        """Return the prompt as caches know it: each placeholder token of an image is replaced by the image's key."""
        key = list(self.prompt)
        for image in self.images:
            key[image.start : image.stop] = [image.key] * image.num_tokens
        return key

    def to_dict(self) -> dict[str, Any]:
        """Return the request as JSON, without the patches of its images."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # asdict would copy every id
        images = [image.to_dict() for image in self.images]
        return {**values, "sampling": asdict(self.sampling), "stop_ids": sorted(self.stop_ids), "images": images}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], patches: Mapping[str, npt.NDArray[np.uint8]] | None = None) -> Request:
        """Read the output of to_dict.

        Args:
            value: output of to_dict.
            patches: patches of the images by digest; None or empty on ranks that do not need them.
        """
        return cls(
            tuple(value["prompt"]),
            value["max_tokens"],
            Sampling(**value["sampling"]),
            frozenset(value["stop_ids"]),
            tuple((id, bias) for id, bias in value["logit_bias"]),
            value["top_logprobs"],
            value["grammar"],
            value["answered"],
            tuple(ImageInput(**image, patches=(patches or {}).get(image["digest"])) for image in value["images"]),
            value["client"],
            value["min_tokens"],
            value["prompt_logprobs"],
            value["next_logprob"],
        )
