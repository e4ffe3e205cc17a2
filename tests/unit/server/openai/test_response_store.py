"""The store of responses: limits, owners, and conversations whose beginning is deleted."""

from __future__ import annotations

import json
import random

import pytest

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.openai.response_store import OVERHEAD_BYTES, ResponseStore, StoredResponse, StoredState


def response(number: int, previous: StoredResponse | None = None, owner: str = "", size: int = 0) -> StoredResponse:
    item = json.dumps({"type": "message", "id": f"msg_{number}", "content": "x" * size}).encode()
    request = json.dumps({"input": f"question {number}"}).encode()
    fields = json.dumps({"id": f"resp_{number}", "output": []}).encode()
    return StoredResponse(f"resp_{number}", owner, request, fields, {f"msg_{number}": item}, {}, previous)


def test_the_least_recently_used_response_is_dropped():
    store = ResponseStore(2)
    for number in (1, 2):
        store.add(response(number))
    store.find("", "resp_1")
    store.add(response(3))
    assert store.find("", "resp_1").to_dict()["output"][0]["id"] == "msg_1"
    with pytest.raises(ApiError, match="dropped for newer ones"):
        store.find("", "resp_2")
    with pytest.raises(ApiError, match="`msg_2` not found") as error:
        store.resolve("", None, ("msg_2",))
    assert error.value.status == 404


def test_a_conversation_stays_complete_when_its_beginning_is_dropped_or_deleted():
    store = ResponseStore(2)
    last = None
    for number in range(50):
        last = response(number, last)
        store.add(last)
    store.delete("", "resp_48")
    body = json.loads(store.resolve("", "resp_49", ()).continued_body(b'{"input": "now"}'))
    assert [turn["request"]["input"] for turn in body["history"]] == [f"question {n}" for n in range(50)]
    assert body["request"] == {"input": "now"}
    assert len(store) == 1
    store.delete("", "resp_49")
    assert (len(store), store.size_bytes) == (0, 0)


def test_no_client_sees_the_responses_of_another():
    store = ResponseStore(9)
    store.add(response(1, owner="key 0"))
    unknown = [errors(store, owner, id) for owner, id in (("key 1", "resp_1"), ("key 0", "resp_2"))]
    assert unknown[0] == [text.replace("_2", "_1") for text in unknown[1]]
    store.find("key 0", "resp_1")


def errors(store: ResponseStore, owner: str, id: str) -> list[str]:
    texts: list[str] = []
    calls = [
        lambda: store.find(owner, id),
        lambda: store.delete(owner, id),
        lambda: store.resolve(owner, id, ()),
        lambda: store.resolve(owner, None, (id.replace("resp", "msg"),)),
    ]
    for call in calls:
        with pytest.raises(ApiError) as error:
            call()
        texts.append(f"{error.value.status} {error.value.code} {error.value.param} {error.value.message}")
    return texts


def test_the_size_limit_includes_the_responses_that_others_continue():
    store = ResponseStore(1000, max_bytes=50 * OVERHEAD_BYTES)
    rng = random.Random(0)
    nodes: list[StoredResponse] = []
    for number in range(400):
        previous = rng.choice(nodes) if nodes and rng.random() < 0.8 else None
        node = response(number, previous, size=rng.randrange(OVERHEAD_BYTES))
        nodes.append(node)
        store.add(node)
        kept = {id(part): part for found in store._responses.values() for part in found.chain()}
        assert store.size_bytes == sum(part.size_bytes for part in kept.values()) <= store.max_bytes
    assert not store.add(response(1000, size=60 * OVERHEAD_BYTES))
    assert (len(store), store.size_bytes) == (0, 0)


def test_the_error_of_a_store_that_keeps_nothing():
    store = ResponseStore(0)
    assert not store.add(response(1))
    with pytest.raises(ApiError, match="keeps no responses") as error:
        store.resolve("", "resp_1", ())
    assert (error.value.status, error.value.code) == (400, "previous_response_not_found")


def test_bodies_in_other_encodings_become_utf_8():
    for encoding in ("utf-8-sig", "utf-16", "utf-32-be"):
        body = json.loads(StoredState().continued_body(json.dumps({"input": "é"}, ensure_ascii=False).encode(encoding)))
        assert body["request"] == {"input": "é"}
