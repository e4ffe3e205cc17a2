"""The path of OpenAI's Responses API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kimi_mlx.server.http.context import Context, read_body
from kimi_mlx.server.http.sse import respond
from kimi_mlx.server.openai.responses_request import ResponsesBody, to_chat_request
from kimi_mlx.server.openai.responses_response import ResponseFormatter


def responses_routes(context: Context) -> list[Route]:
    """Responses, none of which is kept."""

    async def responses(request: Request) -> Response:
        body = await read_body(request, ResponsesBody)
        formatter = ResponseFormatter(context.model_info.resolve(body.model), body)
        return await respond(
            request, context.service.answer(to_chat_request(body)), formatter, is_stream=bool(body.stream)
        )

    return [Route("/v1/responses", responses, methods=["POST"])]
