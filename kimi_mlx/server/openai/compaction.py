"""POST /v1/responses/compact: replace a conversation by the messages of its user and a summary by the model.

The summary is sealed in an item of type `compaction`. A client sends the items back at the beginning of `input`, and
the model then reads the summary as a message.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from kimi_mlx.server.api_types import AnswerEvent, ChatRequest, CompleteAnswer
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.sse import StreamEvent
from kimi_mlx.server.openai.responses_body import Item, MessageItem, ResponsesBody
from kimi_mlx.server.openai.responses_request import ParsedState, to_chat_request
from kimi_mlx.server.openai.responses_response import usage_dict
from kimi_mlx.server.openai.sealed_text import seal
from kimi_mlx.text.messages import Message

INSTRUCTION = (
    "Summarize this conversation, so that another assistant can continue it without reading it. State what the user "
    "wants, what has been done and found, decisions with their reasons, names of files and other facts that are still "
    "needed, and what is left to do. Write only the summary."
)

MAX_SUMMARY_TOKENS = 8192


def to_compaction_request(body: ResponsesBody, state: ParsedState) -> ChatRequest:
    """Return the request for the summary of a conversation. Its tools are not offered.

    Raises:
        ApiError: the conversation is invalid.
    """
    plain = body.model_copy(update={"tool_choice": "none", "text": None, "include": None, "top_logprobs": None})
    request = to_chat_request(plain, state)
    return replace(
        request,
        max_tokens=body.max_output_tokens or MAX_SUMMARY_TOKENS,
        messages=(*request.messages, Message("user", INSTRUCTION)),
        places=(*request.places, "input"),
    )


class CompactionFormatter:
    """Formats a summary; an `ApiFormatter` of responses that are not streamed.

    Args:
        items: items of the conversation.
    """

    def __init__(self, items: Iterable[Item]):
        messages = [item for item in items if isinstance(item, MessageItem) and item.role == "user"]
        self._output = [_message(message) for message in messages]
        self.notes: Sequence[str] = ()

    def begin(self) -> Iterable[StreamEvent]:
        """Return no events."""
        return ()

    def add(self, event: AnswerEvent) -> Iterable[StreamEvent]:
        """Return no events."""
        return ()

    def end(self) -> Iterable[StreamEvent]:
        """Return no events."""
        return ()

    def fail(self, error: ApiError) -> Iterable[StreamEvent]:
        """Return no events."""
        return ()

    def full_response(self, answers: Sequence[CompleteAnswer]) -> dict[str, Any]:
        """Return the user's messages and the summary; if the answer has only reasoning, that is the summary."""
        (answer,) = answers
        summary = answer.delta.text.strip() or answer.delta.reasoning
        item = {"type": "compaction", "id": f"cmp_{secrets.token_hex(12)}", "encrypted_content": seal(summary)}
        return {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*self._output, item],
            "usage": usage_dict(answer.finish.usage),
        }


def _message(message: MessageItem) -> dict[str, Any]:
    content = [part.model_dump(mode="json", exclude_none=True) for part in message.content]
    return {
        "type": "message",
        "id": f"msg_{secrets.token_hex(12)}",
        "role": "user",
        "status": "completed",
        "content": content,
    }
