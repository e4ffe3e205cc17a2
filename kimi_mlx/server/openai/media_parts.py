"""Images and videos in OpenAI's APIs, with Moonshot's extension for videos."""

from __future__ import annotations

from pydantic import Field

from kimi_mlx.server.http.body import Body
from kimi_mlx.server.message_content import ContentBuilder, MediaType
from kimi_mlx.server.request_fields import missing_field, placeholder, unsupported

MEDIA_TYPES: dict[str, MediaType] = {"image_url": "image_url", "input_image": "image_url", "video_url": "video_url"}
"""Types of parts with an image or a video, each with the name of the field that has its URL."""


URL = "Data URL, such as `data:image/png;base64,...`, or URL of a host that the server allows."
NO_EFFECT = "No effect: the model has a rule of its own for the size at which it sees an image."


class MediaUrl(Body):
    """The URL of an image or a video."""

    url: str = Field(description=URL)
    detail: str | None = Field(None, description=NO_EFFECT)


class MediaFields(Body):
    """Fields of a part with an image or a video."""

    type: str
    image_url: str | MediaUrl | None = Field(None, description=URL)
    video_url: str | MediaUrl | None = Field(None, description="Moonshot's extension.")
    file_id: str | None = Field(None, description="Not supported: no files are stored.")
    detail: str | None = Field(None, description=NO_EFFECT)


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
        raise missing_field(f"{place}.{field}")
    content.add_media(field, media if isinstance(media, str) else media.url, place)


def add_result_media(content: ContentBuilder, part: MediaFields, place: str) -> None:
    """Append an image or a video of a tool's result, or a note if it has no URL: the client cannot change the result.

    Args:
        content: content so far.
        part: part whose type is one of MEDIA_TYPES.
        place: location of the part in the body.
    """
    if (part.image_url if MEDIA_TYPES[part.type] == "image_url" else part.video_url) is None:
        content.add_text(placeholder(part.type))
    else:
        add_media(content, part, place)
