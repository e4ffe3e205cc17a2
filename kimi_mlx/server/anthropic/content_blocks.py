"""Convert blocks of Anthropic's Messages API to content of a message: text, images, documents and search results."""

from __future__ import annotations

from typing import Any, cast

from kimi_mlx.server.anthropic.messages_body import (
    DocumentBlock,
    ImageBlock,
    ResultBlock,
    SearchResultBlock,
    TextBlock,
)
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.message_content import ContentBuilder
from kimi_mlx.server.request_fields import missing_field, placeholder, unsupported


def add_block(content: ContentBuilder, block: ResultBlock, place: str) -> None:
    """Append a block to the content of a message.

    Raises:
        ApiError: the block has an unsupported type or source, or lacks a field.
    """
    if isinstance(block, TextBlock):
        content.add_text(block.text)
    elif isinstance(block, ImageBlock):
        content.add_media("image_url", _image_url(block, place), place)
    elif isinstance(block, DocumentBlock):
        content.add_text(_document_text(block, place))
    elif isinstance(block, SearchResultBlock):
        texts = [block.title, block.source, *(part.text for part in block.content or ())]
        content.add_text("\n".join(filter(None, texts)))
    else:
        raise unsupported(f"content of type `{block.type:.60}` is", f"{place}.type")


def add_result_block(content: ContentBuilder, block: ResultBlock, place: str) -> None:
    """Append a block to the result of a tool. Unsupported blocks become notes: the client cannot change results."""
    try:
        add_block(content, block, place)
    except ApiError:
        content.add_text(placeholder("image" if isinstance(block, ImageBlock) else block.type))


def _image_url(block: ImageBlock, place: str) -> str:
    source = block.source
    if source.type not in ("base64", "url"):
        subject = f"an image whose source has the type `{source.type:.60}` is"
        raise unsupported(subject, f"{place}.source.type", "use `base64`")
    field = "data" if source.type == "base64" else "url"
    value = source.data if source.type == "base64" else source.url
    if value is None:
        raise missing_field(f"{place}.source.{field}")
    return value if source.type == "url" else f"data:;base64,{value}"


def _document_text(block: DocumentBlock, place: str) -> str:
    """Return the title, the context and the text of a document."""
    source = block.source
    if source.type not in ("text", "content"):
        subject = f"a document whose source has the type `{source.type:.60}` is"
        raise unsupported(subject, f"{place}.source.type", "send its text, with a source of type `text`")
    field = "data" if source.type == "text" else "content"
    text = source.data if source.type == "text" else _joined(source.content)
    if text is None:
        raise missing_field(f"{place}.source.{field}")
    return "\n".join(filter(None, (block.title, block.context, text)))


def _joined(content: Any) -> str | None:
    """Return the text of a document's content, a string or a list of blocks; None for any other type."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    blocks = [cast("dict[str, Any]", block) for block in cast("list[Any]", content) if isinstance(block, dict)]
    texts = [block.get("text") or placeholder(str(block.get("type"))) for block in blocks]
    return "\n".join(text for text in texts if isinstance(text, str))
