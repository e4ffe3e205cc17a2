"""Images and videos in OpenAI's APIs, with Moonshot's extension for videos."""

from __future__ import annotations

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.message_content import ContentBuilder, MediaType
from kimi_mlx.server.request_fields import unsupported

MEDIA_TYPES: dict[str, MediaType] = {"image_url": "image_url", "input_image": "image_url", "video_url": "video_url"}
"""Types of parts with an image or a video, each with the name of the field that has its URL."""


class MediaUrl(Body):
    """The URL of an image or a video."""

    url: str
    detail: str | None = None


class MediaFields(Body):
    """Fields of a part with an image or a video: `data:` URLs, or URLs of hosts that the server allows.

    `detail` has no effect: the model sees every image at the size that its own rule gives.
    """

    type: str
    image_url: str | MediaUrl | None = None
    video_url: str | MediaUrl | None = None
    file_id: str | None = None
    detail: str | None = None


def add_media(content: ContentBuilder, part: MediaFields, place: str) -> None:
    """Append an image or a video to the content of a message.

    Args:
        content: content so far.
        part: part whose type is one of MEDIA_TYPES.
        place: location of the part in the body.

    Raises:
        ApiError: the part has no URL.
    """
    field = MEDIA_TYPES[part.type]
    media = part.image_url if field == "image_url" else part.video_url
    if media is None and part.file_id is not None:
        raise unsupported("files of an earlier upload are", f"{place}.file_id", f"send a data URL as `{field}`")
    if media is None:
        message = f"`{place}.{field}`: required field is missing"
        raise ApiError(400, message, "missing_required_parameter", f"{place}.{field}")
    content.add_media(field, media if isinstance(media, str) else media.url, place)
