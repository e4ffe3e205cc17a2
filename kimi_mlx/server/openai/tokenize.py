"""POST /tokenize and /detokenize, GET /tokenizer_info: the tokenizer and the chat template, as vLLM offers them.

Source: vllm/entrypoints/serve/tokenize/protocol.py in vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body, parse
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.openai.chat_request import ChatBody, ChatMessage
from kimi_mlx.server.openai.chat_tools import ChatTool
from kimi_mlx.server.openai.completions import MAX_TOKEN_ID, token_text
from kimi_mlx.server.prompts import PromptBuilder
from kimi_mlx.server.request_fields import ListOf
from kimi_mlx.text.tokenizer import read_json


class TokenizeBody(Body):
    """A text, or a conversation with the fields of a chat completion."""

    model: str | None = None
    prompt: str | None = None
    messages: ListOf[ChatMessage] | None = Field(None, min_length=1)
    tools: ListOf[ChatTool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = Field(None, description="Whether to append the beginning of an answer.")
    continue_final_message: bool | None = Field(None, description="Whether an answer would continue the last message.")
    add_special_tokens: bool | None = Field(None, description="No effect: Kimi's tokenizers add none to a text.")
    return_token_strs: bool | None = Field(None, description="Whether to return the text of each token, too.")


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: ListOf[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]]


def tokenize(model_info: ModelInfo, prompt_builder: PromptBuilder, data: bytes) -> dict[str, Any]:
    """Return the response to POST /tokenize.

    Raises:
        ApiError: the body is invalid.
    """
    body = parse(TokenizeBody, data)
    model_info.resolve(body.model)
    if body.prompt is not None and body.messages is not None:
        raise ApiError(400, "`prompt` and `messages` cannot be combined: send one of them", "invalid_value", "prompt")
    if body.messages is not None:
        chat = parse(ChatBody, data).model_copy(update={"add_generation_prompt": None}).to_chat_request()
        has_answer = body.add_generation_prompt is not False or chat.partial is not None
        ids = prompt_builder.chat_ids(chat, add_generation_prompt=has_answer)
    elif body.prompt is not None:
        ids = prompt_builder.text_ids(body.prompt, "prompt")
    else:
        raise ApiError(400, "`prompt` or `messages`: required field is missing", "missing_required_parameter", "prompt")
    token_bytes = prompt_builder.tokenizer.tokenizer.token_bytes
    return {
        "count": len(ids),
        "max_model_len": prompt_builder.context_tokens,
        "tokens": ids,
        "token_strs": [token_text(token_bytes(id)) for id in ids] if body.return_token_strs else None,
    }


def detokenize(model_info: ModelInfo, prompt_builder: PromptBuilder, data: bytes) -> dict[str, Any]:
    """Return the response to POST /detokenize.

    Raises:
        ApiError: the body is invalid, or a token is outside the vocabulary.
    """
    body = parse(DetokenizeBody, data)
    model_info.resolve(body.model)
    prompt_builder.check_ids(body.tokens, "tokens")
    return {"prompt": prompt_builder.tokenizer.decode(body.tokens)}


def tokenizer_info(prompt_builder: PromptBuilder) -> dict[str, Any]:
    """Return the response to GET /tokenizer_info: `tokenizer_config.json`, the chat template, and the end token."""
    chat = prompt_builder.tokenizer
    ends = sorted(chat.stop_ids)
    return {
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]" if "[BOS]" in chat.tokenizer.special_tokens else None,
        "eos_token": chat.decode(ends[:1]) or None,
        **read_json(chat.folder / "tokenizer_config.json"),
        "chat_template": None if chat.template is None else chat.template.sources[0],
    }
