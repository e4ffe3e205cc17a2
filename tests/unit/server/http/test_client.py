"""Which client a request belongs to: its API key if the server has keys, else its address."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.security import CLIENT_KEY, AuthMiddleware, Security


def client_of(keys: tuple[str, ...], headers: dict[str, str], address: str = "10.0.0.7") -> str:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope[CLIENT_KEY])

    pairs = [(name.encode(), value.encode()) for name, value in {"host": "localhost", **headers}.items()]
    scope: dict[str, Any] = {"type": "http", "path": "/v1/models", "headers": pairs, "client": (address, 1234)}
    middleware = AuthMiddleware(app, Security(keys=keys), set())
    asyncio.run(middleware(scope, None, None))  # pyright: ignore[reportArgumentType]
    return seen[0]


def test_clients_are_keys_or_addresses() -> None:
    keys = ("first", "second")
    by_key = {key: client_of(keys, {"authorization": f"Bearer {key}"}) for key in keys}
    assert len(set(by_key.values())) == 2
    assert not any(key in client for key, client in by_key.items())  # it is sent to ranks and may be logged
    assert client_of(keys, {"x-api-key": "second"}, "10.0.0.8") == by_key["second"]
    assert client_of((), {}) == client_of((), {"authorization": "Bearer invented"}) == "10.0.0.7"
    assert client_of((), {}, "10.0.0.8") == "10.0.0.8"
    with pytest.raises(ApiError):
        client_of(keys, {"authorization": "Bearer third"})
