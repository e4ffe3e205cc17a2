"""Routes of Anthropic's API."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimi_mlx.server.anthropic.messages_body import MessagesBody
from kimi_mlx.server.anthropic.request import to_chat_request
from kimi_mlx.server.anthropic.response import MessageFormatter
from kimi_mlx.server.http.body import JsonResponse, parse
from kimi_mlx.server.http.context import ApiCall, Context
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.prompts import PromptBuilder


def anthropic_routes(context: Context) -> list[Route]:
    """Return the routes of messages and token counting."""

    async def messages(request: Request) -> Response:
        return await context.answer(request, read_messages)

    async def count_tokens(request: Request) -> Response:
        count = await context.prepare(request, partial(count_prompt_tokens, context.model_info))
        return JsonResponse({"input_tokens": count})

    return [
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


def read_messages(prompt_builder: PromptBuilder, model_info: ModelInfo, data: bytes) -> ApiCall:
    """Read the body of POST /v1/messages; a `ReadCall`."""
    body = parse(MessagesBody, data)
    formatter = MessageFormatter(_resolve(model_info, body.model))
    return ApiCall([to_chat_request(body)], formatter, bool(body.stream))


def count_prompt_tokens(model_info: ModelInfo, prompt_builder: PromptBuilder, data: bytes) -> int:
    """Return the number of tokens of the prompt in the body of POST /v1/messages/count_tokens."""
    body = parse(MessagesBody, data)  # the fields about the answer have no effect
    _resolve(model_info, body.model)
    return prompt_builder.count_tokens(to_chat_request(body))


def _resolve(model_info: ModelInfo, name: str | None) -> str:
    """Return the model's name for the response; `claude-...` is the served model: tools request such names."""
    return model_info.name if name and name.startswith("claude-") else model_info.resolve(name)
