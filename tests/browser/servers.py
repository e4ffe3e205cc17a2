"""Servers whose answers are known or break in a known way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.server.server import ServingOptions
from tests.fakes import KIMI_MINI, FixedSession
from tests.server.running_server import RunningServer, serving


def tokens_of(answer: str, reasoning: str = "") -> list[int]:
    """Return the tokens of an answer of kimi-mini. Special tokens in `answer` are read as such."""
    tokenizer = ChatTokenizer.load(KIMI_MINI)
    special = tokenizer.tokenizer.special_tokens
    ids = [*tokenizer.encode(reasoning), special["</think>"]]
    rest = answer
    while rest:
        places = [(at, name) for name in special if (at := rest.find(name)) >= 0]
        at, name = min(places, default=(len(rest), ""))
        ids.extend(tokenizer.encode(rest[:at]))
        if name:
            ids.append(special[name])
        rest = rest[at + len(name) :]
    return ids


@contextmanager
def answering(
    answer: str,
    reasoning: str = "",
    tokens_per_s: float = 0,
    is_endless: bool = False,
    options: ServingOptions | None = None,
) -> Iterator[RunningServer]:
    """Serve a model that always gives the same answer.

    Args:
        answer: text of the answer.
        reasoning: its reasoning.
        tokens_per_s: speed; 0 for no limit.
        is_endless: whether to repeat the answer until it is stopped.
        options: options of the server.
    """
    session = FixedSession(tokens_of(answer, reasoning), 1 / tokens_per_s if tokens_per_s else 0, is_endless)
    with serving(session, options) as server:
        yield server
