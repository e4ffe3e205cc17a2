"""Responses that are kept in memory, so that later requests can continue them.

A response is kept with the input of its request and with its output, and refers to the response before it. So each item
of a conversation is kept once, however long the conversation becomes. The least recently used responses are
dropped first; one that a kept response continues stays in memory, but is not found by its id.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kimi_mlx.server.errors import ApiError
from kimi_mlx.units import MB

MAX_KEPT_BYTES = 256 * MB
"""Maximum size of all responses in memory."""

OVERHEAD_BYTES = 2_000
"""Estimated size of a response's objects, besides its texts."""

HINT = "start the server with a larger --keep-responses"


@dataclass(eq=False)
class StoredResponse:
    """A response with all that is needed to continue it. Its texts are JSON in UTF-8.

    Args:
        id: id of the response.
        owner: client that may use it.
        request: JSON text of an object with the input of its request.
        fields: response without its output.
        items: items of its output by id, in order.
        references: items of other responses to which its request refers, by id.
        previous: response that it continues.
    """

    id: str
    owner: str
    request: bytes
    fields: bytes
    items: Mapping[str, bytes]
    references: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    previous: StoredResponse | None = None
    ref_count: int = 0
    """Number of responses in memory that continue it, plus 1 if it can be found by its id."""

    @property
    def size_bytes(self) -> int:
        """Size of the response, without the one that it continues."""
        texts = (self.request, self.fields, *self.items.values(), *self.references.values())
        return OVERHEAD_BYTES + sum(map(len, texts))

    def to_dict(self) -> dict[str, Any]:
        """Return the response object."""
        return {**json.loads(self.fields), "output": [json.loads(item) for item in self.items.values()]}

    def chain(self) -> list[StoredResponse]:
        """Return this response and all that it continues, the oldest first."""
        responses: list[StoredResponse] = []
        response: StoredResponse | None = self
        while response is not None:
            responses.append(response)
            response = response.previous
        return responses[::-1]


@dataclass(frozen=True)
class StoredState:
    """The stored responses that a request continues.

    Args:
        previous: response that the request follows, if it follows one.
        references: items to which it refers, by id.
    """

    previous: StoredResponse | None = None
    references: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

    def continued_body(self, request: bytes) -> bytes:
        """Return the body of a request together with the stored responses: the JSON text of a ContinuedBody."""
        chain = self.previous.chain() if self.previous else []
        turns = [b'{"request":%b,"output":[%b]}' % (turn.request, b",".join(turn.items.values())) for turn in chain]
        references = {id: item for turn in chain for id, item in turn.references.items()} | dict(self.references)
        items = [b"%b:%b" % (json.dumps(id).encode(), item) for id, item in references.items()]
        parts = (b",".join(turns), b",".join(items), to_utf8(request))
        return b'{"history":[%b],"items":{%b},"request":%b}' % parts


class ResponseStore:
    """Keeps the most recently used responses. Its methods may be called in any thread.

    Args:
        max_responses: maximum number of responses that are found by their ids.
        max_bytes: maximum size of all responses, with those that they continue.
    """

    def __init__(self, max_responses: int, max_bytes: int = MAX_KEPT_BYTES):
        self.max_responses, self.max_bytes = max_responses, max_bytes
        self.size_bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()  # the least recently used first
        self._response_of_item: dict[str, StoredResponse] = {}  # by id of the item
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._responses)

    def add(self, response: StoredResponse) -> bool:
        """Keep a response; return False if it is too large."""
        with self._lock:
            self._responses[response.id] = response
            self._response_of_item |= dict.fromkeys(response.items, response)
            self._retain(response)
            while len(self._responses) > self.max_responses or self.size_bytes > self.max_bytes:
                self._remove(next(iter(self._responses)))
            return response.id in self._responses

    def find(self, owner: str, id: str, param: str | None = None) -> StoredResponse:
        """Return a response of a client.

        Args:
            owner: client.
            id: id of the response.
            param: location of the id in a request's body.

        Raises:
            ApiError: 404, there is no such response, or it belongs to another client.
        """
        with self._lock:
            response = self._responses.get(id)
            if response is None or response.owner != owner:
                raise self._missing("response", id, param)
            self._responses.move_to_end(id)
            return response

    def resolve(self, owner: str, previous_id: str | None, item_ids: tuple[str, ...]) -> StoredState:
        """Return the stored responses that a request continues.

        Raises:
            ApiError: 404, a response or an item is not kept, or belongs to another client.
        """
        previous = None if previous_id is None else self.find(owner, previous_id, "previous_response_id")
        references: dict[str, bytes] = {}
        with self._lock:
            for id in item_ids:
                response = self._response_of_item.get(id)
                if response is None or response.owner != owner:
                    raise self._missing("item", id, "input")
                self._responses.move_to_end(response.id)
                references[id] = response.items[id]
        return StoredState(previous, references)

    def delete(self, owner: str, id: str) -> None:
        """Drop a response. Those that continue it stay complete.

        Raises:
            ApiError: 404, there is no such response, or it belongs to another client.
        """
        self.find(owner, id)
        with self._lock:
            if id in self._responses:
                self._remove(id)

    def _missing(self, kind: str, id: str, param: str | None) -> ApiError:
        """Return the error for an id. Status and code are OpenAI's."""
        reason = "it was deleted, dropped for newer ones, or never kept; send the whole conversation instead"
        if self.max_responses == 0:
            reason = "this server keeps no responses; send the whole conversation instead"
        if param == "previous_response_id":
            message = f"previous response with id `{id:.80}` not found: {reason}"
            return ApiError(400, message, "previous_response_not_found", param, hint=HINT)
        return ApiError(404, f"{kind} with id `{id:.80}` not found: {reason}", "not_found", param, hint=HINT)

    def _remove(self, id: str) -> None:
        response = self._responses.pop(id)
        for item in response.items:
            if self._response_of_item.get(item) is response:
                del self._response_of_item[item]
        self._release(response)

    def _retain(self, response: StoredResponse) -> None:
        """Increment the reference count of a response; the first reference also counts for the response before it."""
        node: StoredResponse | None = response
        while node is not None:
            node.ref_count += 1
            if node.ref_count > 1:
                return
            self.size_bytes += node.size_bytes
            node = node.previous

    def _release(self, response: StoredResponse) -> None:
        """Decrement the reference count of a response; without references it releases the response before it."""
        node: StoredResponse | None = response
        while node is not None:
            node.ref_count -= 1
            if node.ref_count > 0:
                return
            self.size_bytes -= node.size_bytes
            node = node.previous


def to_utf8(body: bytes) -> bytes:
    """Return the JSON text of a valid body in UTF-8 without a byte order mark."""
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body
    text = body.decode(encoding, "surrogatepass").removeprefix("\ufeff")
    return text.encode("utf-8", "surrogatepass")
