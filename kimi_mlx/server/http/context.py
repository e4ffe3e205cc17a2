"""Service, model info and body reading for the routes of all APIs."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from kimi_mlx.server.http.access_log import RECORD_KEY, RequestRecord
from kimi_mlx.server.http.body import AnyBody, parse
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.service import Service


@dataclass(frozen=True)
class Context:
    """Objects that all routes use.

    Args:
        service: service that answers requests.
        model_info: names and properties of the model.
    """

    service: Service
    model_info: ModelInfo


async def read_body(request: Request, model: type[AnyBody]) -> AnyBody:
    """Read, record and parse the body of a request.

    Raises:
        ApiError: the body is invalid.
    """
    text = await request.body()
    record: RequestRecord = request.scope[RECORD_KEY]
    record.body = text
    return parse(model, text)
