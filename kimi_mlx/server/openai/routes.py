"""Routes of OpenAI's APIs."""

from __future__ import annotations

import time
import uuid
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimi_mlx.server.http.body import JsonResponse, parse
from kimi_mlx.server.http.context import ApiCall, Context
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.openai.chat_request import ChatBody
from kimi_mlx.server.openai.chat_response import ChatFormatter
from kimi_mlx.server.openai.completions import CompletionBody, CompletionFormatter
from kimi_mlx.server.openai.tokenize import detokenize, tokenize, tokenizer_info
from kimi_mlx.server.prompts import PromptBuilder


def openai_routes(context: Context) -> list[Route]:
    """Return the routes of chat completions, plain completions, the tokenizer and models."""
    model_info = context.model_info

    async def chat(request: Request) -> Response:
        return await context.answer(request, read_chat)

    async def count_input_tokens(request: Request) -> Response:
        count = await context.prepare(request, partial(count_prompt_tokens, model_info))
        return JsonResponse({"object": "response.input_tokens", "input_tokens": count})

    async def completions(request: Request) -> Response:
        return await context.answer(request, read_completion)

    async def tokenize_text(request: Request) -> Response:
        return JsonResponse(await context.prepare(request, partial(tokenize, model_info)))

    async def detokenize_ids(request: Request) -> Response:
        return JsonResponse(await context.prepare(request, partial(detokenize, model_info)))

    async def tokenizer(request: Request) -> Response:
        return JsonResponse(tokenizer_info(context.service.prompt_builder))

    async def models(request: Request) -> Response:
        # the last three fields are those of Anthropic's API, which has the same path
        page = {"has_more": False, "first_id": model_info.name, "last_id": model_info.name}
        return JsonResponse({"object": "list", "data": [model_info.to_dict()], **page})

    async def model(request: Request) -> Response:
        model_info.resolve(request.path_params["name"])
        return JsonResponse(model_info.to_dict())

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/chat/completions/input_tokens", count_input_tokens, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/tokenize", tokenize_text, methods=["POST"]),
        Route("/detokenize", detokenize_ids, methods=["POST"]),
        Route("/tokenizer_info", tokenizer),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def read_chat(prompt_builder: PromptBuilder, model_info: ModelInfo, data: bytes) -> ApiCall:
    """Read the body of POST /v1/chat/completions; a `ReadCall`."""
    body = parse(ChatBody, data)
    model = model_info.resolve(body.model)
    table = body.tool_table()
    formatter = ChatFormatter(
        f"chatcmpl-{uuid.uuid4().hex}",
        model,
        int(time.time()),
        include_usage=body.include_usage,
        include_logprobs=bool(body.logprobs),
        include_progress=bool(body.return_progress),
        include_reasoning=body.shows_reasoning,
        tools=table.names,
    )
    return ApiCall([body.to_chat_request(table)], formatter, bool(body.stream))


def count_prompt_tokens(model_info: ModelInfo, prompt_builder: PromptBuilder, data: bytes) -> int:
    """Return the number of tokens of the prompt in the body of a chat completion."""
    body = parse(ChatBody, data)
    model_info.resolve(body.model)
    return prompt_builder.count_tokens(body.to_chat_request())


def read_completion(prompt_builder: PromptBuilder, model_info: ModelInfo, data: bytes) -> ApiCall:
    """Read the body of POST /v1/completions; a `ReadCall`."""
    body = parse(CompletionBody, data)
    model = model_info.resolve(body.model)
    requests = body.to_completion_requests()
    decode = prompt_builder.tokenizer.decode
    echoes = [
        "" if not body.echo else prompt if isinstance(prompt, str) else decode(prompt)
        for prompt, n in ((request.prompt, request.n) for request in requests)
        for _ in range(n)
    ]
    formatter = CompletionFormatter(
        f"cmpl-{uuid.uuid4().hex}",
        model,
        int(time.time()),
        echoes,
        include_usage=body.include_usage,
        has_prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    return ApiCall(requests, formatter, bool(body.stream))
