"""Answers of a loaded model in this process, without a session: `kimi_mlx.stream`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.request import Sampling
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer, MessageLike
from kimi_mlx.session.local_chat_model import make_request, parse_events
from kimi_mlx.text.messages import Delta


def stream(
    model: Model,
    tokenizer: ChatTokenizer,
    messages: Sequence[MessageLike],
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> Iterator[Delta]:
    """Answer messages with a model from kimi_mlx.load, in this process and without a session.

    Args:
        model: model from `load`.
        tokenizer: tokenizer from `load`.
        messages: messages in OpenAI's format: `{"role": ..., "content": ...}`, with images as data URLs or bytes.
        max_tokens: maximum number of new tokens; None is the checkpoint's default, usually the rest of the context.
        sampling: how tokens are sampled; None is the checkpoint's recommendation.
        tools: OpenAI-style tools that the model may call.
        template_kwargs: variables of the chat template, such as `thinking=False`.

    Yields:
        Delta: new text, reasoning or tool calls.
    """
    prompt = tokenizer.prompt(messages, tools, **template_kwargs)
    request = make_request(tokenizer, prompt, sampling, max_tokens)
    for event in parse_events(Engine(model).generate(request), tokenizer.output_parser(prompt.ids, tools)):
        if isinstance(event, Delta):
            yield event
