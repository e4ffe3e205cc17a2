"""GET /v1/responses/{id}/input_items: the items from which a response was generated, a page at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import parse_json
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.units import is_short_number

Value = dict[str, Any]

DEFAULT_LIMIT, MAX_LIMIT = 20, 100

ID_PREFIXES = {"message": "msg", "function_call": "fc", "reasoning": "rs"}


@dataclass(frozen=True)
class Page:
    """A page of a list.

    Args:
        limit: maximum number of items.
        is_ascending: whether the oldest item comes first.
        after: id of the item before the page.
    """

    limit: int
    is_ascending: bool
    after: str | None

    def select(self, items: list[Value]) -> Value:
        """Return the page of a list of items, the oldest first.

        Raises:
            ApiError: 404, there is no item `after`.
        """
        ordered = items if self.is_ascending else items[::-1]
        if self.after is not None:
            at = next((at for at, item in enumerate(ordered) if item["id"] == self.after), None)
            if at is None:
                raise ApiError(404, f"there is no item `{self.after:.80}`", "not_found", "after")
            ordered = ordered[at + 1 :]
        page = ordered[: self.limit]
        ids = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return {"object": "list", "data": page, "has_more": len(ordered) > len(page), **ids}


def page_of(query: Mapping[str, str]) -> Page:
    """Return the page that the query parameters of a URL describe.

    Raises:
        ApiError: a parameter is invalid.
    """
    order, limit = query.get("order", "desc"), query.get("limit", str(DEFAULT_LIMIT))
    if order not in ("asc", "desc"):
        raise ApiError(400, "`order`: must be `asc` or `desc`", "invalid_value", "order")
    if not (is_short_number(limit) and 1 <= int(limit) <= MAX_LIMIT):
        raise ApiError(400, f"`limit`: must be 1 to {MAX_LIMIT}", "invalid_value", "limit")
    return Page(int(limit), order == "asc", query.get("after"))


def list_items(response_id: str, builder: PromptBuilder, data: bytes) -> list[Value]:
    """Return the items of a stored request and of the responses before it, the oldest first; a `Work`.

    Args:
        response_id: id of the response; ids for items without one are derived from it.
        builder: not used.
        data: JSON text of a ContinuedBody.
    """
    continued: Value = parse_json(data)
    items: list[Any] = []
    for turn in continued["history"]:
        items += [*_input(turn["request"]), *turn["output"]]
    items += _input(continued["request"])
    references: Value = continued["items"]
    resolved = [references.get(str(item.get("id")), item) if _is_reference(item) else item for item in items]
    return [_complete(item, f"{response_id.removeprefix('resp_')}{index}") for index, item in enumerate(resolved)]


def _input(request: Value) -> list[Value]:
    given: Any = request.get("input") or []
    return [{"role": "user", "content": given}] if isinstance(given, str) else cast("list[Value]", given)


def _is_reference(item: Value) -> bool:
    return item.get("type") == "item_reference" or ("type" not in item and "role" not in item)


def _complete(item: Value, suffix: str) -> Value:
    """Return an item with the fields that the API always has."""
    kind = item.get("type") or "message"
    value: Value = {"type": kind, "id": f"{ID_PREFIXES.get(kind, 'item')}_{suffix}", "status": "completed", **item}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        content: Value = {"type": part, "text": item["content"]}
        value["content"] = [content if part == "input_text" else {**content, "annotations": []}]
    return {name: field for name, field in value.items() if field is not None}
