"""Conversations by id or title, and the search in their text."""

from __future__ import annotations

import pytest

from kimi_mlx.errors import HistoryError
from kimi_mlx.history.find import find_conversation, search
from kimi_mlx.history.store import HistoryStore
from kimi_mlx.text.messages import Delta, Message


def add(store: HistoryStore, *texts: str, title: str = "") -> str:
    conversation = store.create("m")
    for text in texts:
        store.add_message(conversation.number, Message("user", text), "m", {})
    if title:
        store.rename(conversation.number, title)
    return conversation.id


def test_conversations_by_name(store: HistoryStore) -> None:
    with pytest.raises(HistoryError, match="there are no conversations yet"):
        find_conversation(store)
    first = add(store, "one", title="Tax return")
    second = add(store, "two", title="Tax law")
    assert find_conversation(store).id == second
    assert find_conversation(store, first).id == first
    assert find_conversation(store, first[:6]).id == first
    assert find_conversation(store, "tax RETURN").id == first
    assert find_conversation(store, "law").id == second
    with pytest.raises(HistoryError, match="2 conversations match `tax`") as caught:
        find_conversation(store, "tax")
    assert first in caught.value.message
    with pytest.raises(HistoryError, match="there is no conversation `nothing`"):
        find_conversation(store, "nothing")


def test_an_id_comes_before_a_title(store: HistoryStore) -> None:
    first = add(store, "one")
    add(store, "two", title=f"about {first}")
    assert find_conversation(store, first).id == first


@pytest.mark.parametrize(
    ("words", "snippet"),
    [
        (["SECOND"], "the second message"),
        (["second", "mess"], "the second message"),
        (["second message"], "the second message"),
        (['say "hi"'], 'we say "hi" to 漢字 and STRASSE'),
        (["漢字"], 'we say "hi" to 漢字 and STRASSE'),
        (["straße"], 'we say "hi" to 漢字 and STRASSE'),
        (["100%_"], "a 100%_ literal"),
    ],
)
def test_words_are_found(store: HistoryStore, words: list[str], snippet: str) -> None:
    texts = ["the first", "the second\nmessage", 'we say "hi" to 漢字 and STRASSE', "a 100%_ literal"]
    for text in texts:
        add(store, text, "other")
    (match,) = search(store, words)
    assert (match.snippet, match.num_messages, match.role) == (snippet, 1, "user")


def test_titles_and_unfinished_answers_are_found(store: HistoryStore) -> None:
    titled = add(store, "text", title="Tax return")
    conversation = store.create("m")
    answer = store.begin_answer(conversation.number, "m", {})
    store.add_delta(answer, 0, Delta("an unfi"))
    store.add_delta(answer, 1, Delta("nished answer"))
    assert [match.conversation.id for match in search(store, ["tax"])] == [titled]
    assert [match.conversation.id for match in search(store, ["unfinished"])] == [conversation.id]
    assert search(store, ["role"]) == []
    assert search(store, ["text", "nished"]) == []


def test_a_snippet_is_around_the_first_match(store: HistoryStore) -> None:
    add(store, "before " * 50 + "needle" + " after" * 50)
    (match,) = search(store, ["needle"])
    assert match.snippet.startswith("...")
    assert match.snippet.endswith("...")
    assert "before needle after" in match.snippet
    assert len(match.snippet) < 130
