"""What the paths of every API are given."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from kimi_mlx.server.http.access_log import RECORD_KEY, RequestRecord
from kimi_mlx.server.http.body import AnyBody, parse
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.service import Service


@dataclass(frozen=True)
class Context:
    """A server's parts.

    Args:
        service: that answers.
        served: the model's names.
    """

    service: Service
    model_info: ModelInfo


async def read_body(request: Request, kind: type[AnyBody]) -> AnyBody:
    """The body of a request.

    Raises:
        ApiError: it is not what it should be.
    """
    text = await request.body()
    record: RequestRecord = request.scope[RECORD_KEY]
    record.body = text
    return parse(kind, text)
