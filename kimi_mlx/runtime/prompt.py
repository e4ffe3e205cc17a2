"""Prompts: token ids, with the images that belong to their placeholder tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kimi_mlx.engine.request import ImageInput
from kimi_mlx.errors import ImageError, TextError
from kimi_mlx.images.limits import MediaLimits
from kimi_mlx.text.media import MEDIA_BEGIN, MEDIA_CONTENT, MEDIA_END, MEDIA_PAD, Media, MediaKind
from kimi_mlx.text.template import TEMPLATE_HINT, VIDEO_ID
from kimi_mlx.text.tokenizer import Tokenizer
from kimi_mlx.units import format_bytes

if TYPE_CHECKING:  # at run time they import PIL, which text does not need
    from kimi_mlx.images.prepared import PreparedImage
    from kimi_mlx.images.video import MediaChunk


@dataclass(frozen=True)
class Prompt:
    """A prompt for the engine.

    Args:
        ids: token ids, with one placeholder token for each token of an image.
        images: images and chunks of videos, in the order of their tokens.
    """

    ids: list[int]
    images: tuple[ImageInput, ...] = ()


def build_prompt(
    tokenizer: Tokenizer,
    parts: Sequence[str | int],
    media: Sequence[Media],
    prepare: Callable[[MediaKind, str | bytes, str], Sequence[MediaChunk]],
    limits: MediaLimits,
) -> Prompt:
    """Return the prompt of a rendered conversation, with images in place of the template's placeholders.

    Args:
        tokenizer: tokenizer of the checkpoint.
        parts: rendered conversation, from `ChatTemplate.render_parts`.
        media: images and videos of the messages, in order.
        prepare: function that decodes an image or a video: kind, source and place, as in `Media`.
        limits: limits of the number of images and of their patches.

    Raises:
        ImageError: an image cannot be read, there are too many, or the template did not write one placeholder for each.
        TextError: the template wrote placeholders although the messages have no images.
    """
    pad = tokenizer.special_tokens.get(MEDIA_PAD, VIDEO_ID)
    _check_placeholders(["video" if part == VIDEO_ID else "image" for part in parts if part in (pad, VIDEO_ID)], media)
    if len(media) > limits.max_images:
        raise _too_many(media[limits.max_images], f"{len(media)} images", f"{limits.max_images}")
    remaining = iter(media)
    writer = _PromptWriter(tokenizer, pad)
    for part in parts:
        if isinstance(part, str):
            writer.add_text(part)
        elif part not in (pad, VIDEO_ID):
            writer.add_token(part)
        else:
            item = next(remaining)
            for chunk in prepare(item.kind, item.source, item.place):
                writer.add_image(chunk.image) if part == pad else writer.add_video_chunk(chunk)
            writer.check_limits(item, limits)
    return writer.finish()


def _too_many(item: Media, amount: str, limit: str) -> ImageError:
    return ImageError(
        item.place, f"with it the prompt has {amount}, more than {limit}", hint="send fewer or smaller images"
    )


def _check_placeholders(written: Sequence[str], media: Sequence[Media]) -> None:
    """Check that the template wrote one placeholder for each image and each video, in their order."""
    kinds = [item.kind for item in media]
    if written == kinds:
        return
    if not kinds:
        raise TextError(
            f"the chat template wrote placeholders for {len(written)} images, but the messages have none",
            hint=TEMPLATE_HINT,
        )
    wanted, found = Counter(kinds), Counter(written)
    if wanted == found:
        reason = "the chat template of this model wrote placeholders for images and videos in another order"
        raise ImageError(media[0].place, reason, hint=TEMPLATE_HINT)
    kind = next(kind for kind in wanted | found if wanted[kind] != found[kind])
    raise ImageError(
        next((item.place for item in media if item.kind == kind), media[0].place),
        f"the chat template of this model wrote placeholders for {found[kind]} {kind}s, but the messages have "
        f"{wanted[kind]}",
        hint=TEMPLATE_HINT if found[kind] else f"use a model that sees {kind}s, such as Kimi K2.5",
    )


class _PromptWriter:
    """Joins parts of a prompt. Adjacent texts are encoded together, since tokens may cross their border."""

    def __init__(self, tokenizer: Tokenizer, pad: int):
        self._tokenizer = tokenizer
        self._pad = pad
        self._text = ""
        self._ids: list[int] = []
        self._images: list[ImageInput] = []
        self._num_bytes = 0

    def add_text(self, text: str) -> None:
        """Add plain text."""
        self._text += text

    def add_token(self, token_id: int) -> None:
        """Add a control token."""
        self._flush()
        self._ids.append(token_id)

    def add_image(self, image: PreparedImage) -> None:
        """Add the placeholder tokens of an image."""
        self._flush()
        self._images.append(ImageInput(len(self._ids), image.num_tokens, image.grid, image.digest, image.patches))
        self._ids += [self._pad] * image.num_tokens
        self._num_bytes += image.num_bytes

    def add_video_chunk(self, chunk: MediaChunk) -> None:
        """Add a chunk of a video as Kimi's image processor writes it: its time, then its tokens between marks."""
        begin, content, end = (self._tokenizer.special_tokens[name] for name in (MEDIA_BEGIN, MEDIA_CONTENT, MEDIA_END))
        self.add_text(chunk.time_stamp)
        self.add_token(begin)
        self.add_text("video")
        self.add_token(content)
        self.add_image(chunk.image)
        self.add_token(end)

    def check_limits(self, item: Media, limits: MediaLimits) -> None:
        """Check the number of the images so far, and the size of their patches.

        Args:
            item: image that was added last, for error messages.
            limits: limits of a prompt.
        """
        if len(self._images) > limits.max_images:
            raise _too_many(item, f"{len(self._images)} images and chunks of videos", f"{limits.max_images}")
        if self._num_bytes > limits.max_prepared_bytes:
            limit = format_bytes(limits.max_prepared_bytes)
            raise _too_many(item, f"{format_bytes(self._num_bytes)} of pixels", limit)

    def finish(self) -> Prompt:
        """Return the prompt."""
        self._flush()
        return Prompt(self._ids, tuple(self._images))

    def _flush(self) -> None:
        if self._text:
            self._ids += self._tokenizer.encode(self._text)
            self._text = ""
