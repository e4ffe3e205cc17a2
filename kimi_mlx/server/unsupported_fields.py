"""Fields of other servers' APIs that would change an answer, but that an API of this server does not have.

A client that sends one gets an error that names it, unless its value has no effect. All other unknown fields are
ignored. docs/request-fields.md lists the fields of other servers.

Sources: `ChatCompletionRequest` of vLLM and of SGLang, the README of llama.cpp's server, and the API references of
OpenAI, Anthropic and Moonshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import model_validator

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body

NO_CONTENT: tuple[Any, ...] = (None, "", [], {})
"""Values that have no effect in any field."""

UNSUPPORTED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    # sampling: vLLM, SGLang
    "allowed_token_ids": (),
    "bad_words": (),
    "custom_logit_processor": (),
    "logits_processors": (),
    "frequency_penalty": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "repetition_detection": (),
    "stop_regex": (),
    "stop_token_ids": (),
    "use_beam_search": (False,),
    # sampling: llama.cpp
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "lora": (),
    "min_keep": (0,),
    "mirostat": (0,),
    "n_indent": (0,),
    "n_predict": (-1,),
    "repeat_penalty": (1,),
    "samplers": (),
    "t_max_predict_ms": (0, -1),
    "top_n_sigma": (0, -1),
    "typical_p": (1,),
    "typ_p": (1,),
    "xtc_probability": (0,),
    # constraints: vLLM, SGLang, llama.cpp
    "ebnf": (),
    "grammar": (),
    "grammar_lazy": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_json_object": (False,),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "structural_tag": (),
    "structured_outputs": (),
    # prompt: vLLM, SGLang, OpenAI
    "add_generation_prompt": (True,),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": (),
    "input_embeds": (),
    "input_ids": (),
    "lora_path": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "session_params": (),
    "truncate_prompt_tokens": (),
    "vllm_xargs": (),
    # reasoning: Moonshot, vLLM, llama.cpp
    "enable_thinking": (),
    "include_reasoning": (True,),
    "reasoning_effort": (),
    "thinking": (),
    "reasoning_budget": (-1,),
    "thinking_budget": (-1,),
    "thinking_budget_tokens": (-1,),
    "thinking_token_budget": (-1,),
    # form of the answer: vLLM, SGLang, llama.cpp
    "echo": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "n_probs": (0,),
    "no_stop_trim": (False,),
    "parse_tool_calls": (True,),
    "post_sampling_probs": (False,),
    "prompt_logprobs": (False,),
    "reasoning_format": ("auto", "deepseek"),
    "reasoning_in_content": (False,),
    "return_hidden_states": (False,),
    "return_token_ids": (False,),
    "return_tokens": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    # OpenAI, Anthropic, OpenRouter
    "audio": (),
    "container": (),
    "modalities": (["text"],),
    "plugins": (),
    "transforms": (),
    "web_search_options": (),
    # fields that this server has in other APIs
    "best_of": (1,),
    "instructions": (),
    "logit_bias": (),
    "max_completion_tokens": (-1,),
    "max_output_tokens": (-1,),
    "max_tokens": (-1,),
    "min_p": (0,),
    "n": (1,),
    "output_config": (),
    "output_format": (),
    "seed": (),
    "stop": (),
    "stop_sequences": (),
    "suffix": (),
    "system": (),
    "tools": (),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "top_p": (1,),
}
"""Names of the fields, each with the values besides NO_CONTENT that have no effect.

Each API supports some of them; the others are refused."""


class CheckedBody(Body):
    """A request body that refuses those of UNSUPPORTED_FIELDS that it does not have."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported_fields(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name, sent in cast("dict[str, Any]", value).items():
                if name in UNSUPPORTED_FIELDS and name not in cls.model_fields and not _has_no_effect(sent, name):
                    message = f"`{name:.80}` is not supported: leave it out"
                    raise ApiError(400, message, "unsupported_parameter", name)
        return cast("Any", value)


def _has_no_effect(value: Any, name: str) -> bool:
    return any(value == neutral for neutral in (*NO_CONTENT, *UNSUPPORTED_FIELDS[name]))
