"""A checkpoint that gives the answers of a script, for tests of programs that need more than kimi-mini's abilities.

It is a real checkpoint of the K2 family with one layer, so every command takes it as MODEL. It has kimi-mini's tokens,
some more, and nearly its chat template. The next token depends on the last ones:

    <|im_assistant|> assistant <|im_middle|> <|answer_2|> <think>   I will l  ist the   files ...
    end of the prompt, with the number of the answer                tokens of answer 2, then <|im_end|>

The template counts the assistant's messages of the conversation, or looks for a text in its last message. Head 0 of the
layer attends to the number of the answer, the others to the token one, two, ... positions back, by rotation alone; the
last token itself is in the residual stream. Each of these increases the logits of all tokens that ever follow it in the
script. The next token of the script follows all of them, so it has the largest logit. For this to work, an answer has
no token of text twice.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kimi_mlx.text.tokenizer import Tokenizer
from kimi_mlx.text.vocabulary import read_ranks
from tests.checkpoints import write_shards
from tests.fakes import KIMI_MINI

NUM_PREVIOUS = 3
"""Number of tokens before the last one on which the next token depends: more than the markers between two texts."""

ROPE_DIM = 32
ROPE_THETA = 10_000.0
ATTENTION_GAIN = 100.0
"""Attention score of the right token; the next best one, a neighbour, has at most 0.96 of it."""

LOGIT_GAP = 30.0
"""Logit that one matching token adds: sampling at the usual temperatures never takes another token."""

FIRST_ANSWER_ID = 64
"""Id of `<|answer_0|>`, counted from the first special token."""
MAX_ANSWERS = 128
MAX_CHUNK_BYTES = 64
USUAL_CHUNK_BYTES = 7

HEADER = ("<|im_assistant|>", "assistant", "<|im_middle|>")
"""Text before the number of the answer; `<think>` follows it."""
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, ARGUMENT_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
THINK_BEGIN, THINK_END, END = "<think>", "</think>", "<|im_end|>"


@dataclass(frozen=True)
class Call:
    """A tool call of a scripted answer.

    Args:
        name: name of the tool, as the server shows it to the model.
        arguments: arguments. If they are constrained, their order must be that of the schema; text is written as it is.
    """

    name: str
    arguments: dict[str, Any] | str


@dataclass(frozen=True)
class Answer:
    """A scripted answer.

    Args:
        text: text of the answer.
        reasoning: reasoning before it, if the conversation has thinking on.
        calls: tool calls after the text.
        after: text in the last message of the prompt that selects this answer. Answers without it are given in turn, by
            the number of earlier answers in the conversation; the last of them is repeated.
        num_earlier_calls: number of calls in the conversation before this answer; None counts those of the earlier
            answers without `after`.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    after: str | None = None
    num_earlier_calls: int | None = None


def write_scripted_model(folder: Path, answers: Sequence[Answer], context_tokens: int = 131_072) -> Path:
    """Write the checkpoint of a script: some megabytes for a hundred words, more than in proportion for longer ones.

    Args:
        folder: target; created if missing.
        answers: answers, at least one without `after`.
        context_tokens: size of the context.

    Returns:
        The folder.

    Raises:
        ValueError: an answer repeats itself too often, or there are too many answers.
    """
    if len(answers) > MAX_ANSWERS:
        raise ValueError(f"a script has at most {MAX_ANSWERS} answers")
    folder.mkdir(parents=True, exist_ok=True)
    num_calls, scripts = 0, list[list[bytes | str]]()
    for answer in answers:
        first = num_calls if answer.num_earlier_calls is None else answer.num_earlier_calls
        scripts.append(list(_tokens(_parts(answer, first))))
        num_calls += 0 if answer.after else len(answer.calls)
    _write_text_files(folder, answers, [token for script in scripts for token in script])
    chain = _Chain(Tokenizer.load(folder), scripts)
    config = json.loads((folder / "config.json").read_text())
    write_shards(folder, *_weights(chain, config, context_tokens), num_shards=1)
    return folder


def _parts(answer: Answer, first_index: int) -> list[str]:
    """Return the texts and control tokens of an answer after `<think>`."""
    parts = [answer.reasoning, THINK_END, answer.text]
    if answer.calls:
        parts.append(SECTION_BEGIN)
        for index, call in enumerate(answer.calls, first_index):
            arguments = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments)
            parts += [CALL_BEGIN, f"functions.{call.name}:{index}", ARGUMENT_BEGIN, arguments, CALL_END]
        parts.append(SECTION_END)
    return [part for part in [*parts, END] if part]


def _tokens(parts: Iterable[str]) -> Iterator[bytes | str]:
    """Yield the tokens of an answer: control tokens, and texts in chunks that are all different."""
    control = {THINK_BEGIN, THINK_END, END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END}
    used: set[bytes] = set()
    for part in parts:
        if part in control:
            yield part
            continue
        text = part.encode()
        while text:
            sizes = sorted(
                range(1, min(MAX_CHUNK_BYTES, len(text)) + 1), key=lambda size: abs(size - USUAL_CHUNK_BYTES)
            )
            size = next((size for size in sizes if text[:size] not in used), None)
            if size is None:
                raise ValueError(f"an answer repeats itself too often: `{part[:40]}`")
            used.add(text[:size])
            yield text[:size]
            text = text[size:]


class _Chain:
    """Transitions of all answers.

    Args:
        tokenizer: tokenizer with all tokens.
        scripts: tokens of each answer.
    """

    def __init__(self, tokenizer: Tokenizer, scripts: Sequence[Sequence[bytes | str]]):
        ids = {text: id for id, text in enumerate(tokenizer.tokens())}
        special = tokenizer.special_tokens
        header = [id for part in HEADER for id in ([special[part]] if part in special else tokenizer.encode(part))]
        think = [special[THINK_BEGIN], special[THINK_END]]
        self.vocab_size = tokenizer.vocab_size
        self.numbers = [special[f"<|answer_{index}|>"] for index in range(len(scripts))]
        """Id of the number of each answer."""
        self.scripts = [[special[t] if isinstance(t, str) else ids[t] for t in script] for script in scripts]
        """Ids of each answer."""
        self.followers: list[dict[int, set[int]]] = [{} for _ in range(NUM_PREVIOUS + 1)]
        """Ids that follow an id, by the distance minus one."""
        for number, script in zip(self.numbers, self.scripts, strict=True):
            prompt = [*header, number, think[0]]
            self._add(prompt, script)
            self._add([*prompt, think[1]], script[script.index(think[1]) + 1 :])  # thinking is off
        listed = dict.fromkeys([*header, *think, *itertools.chain(*self.scripts), *self.numbers])
        self.units = {id: unit for unit, id in enumerate(sorted(listed, key=self.numbers.__contains__))}
        """Number of each id in the model, the numbers of answers last."""

    def _add(self, prompt: list[int], script: list[int]) -> None:
        ids = prompt + script
        for at in range(len(prompt), len(ids)):
            for distance, followers in enumerate(self.followers):
                if at > distance:
                    followers.setdefault(ids[at - 1 - distance], set()).add(ids[at])


def _weights(chain: _Chain, base: dict[str, Any], context_tokens: int) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return the config and the tensors, in the published layout.

    The residual stream has a block with all units for the last token, and one for each head.
    """
    num_units, num_heads = len(chain.units), NUM_PREVIOUS + 1
    hidden, first_number = num_units * (num_heads + 1), num_units - len(chain.numbers)
    gain = ATTENTION_GAIN * (num_units + ROPE_DIM) ** 0.5
    heads = np.zeros((num_heads, num_units + ROPE_DIM, hidden), np.float32)
    heads[0, 0, :num_units] = gain
    angles = ROPE_THETA ** (-np.arange(0, ROPE_DIM, 2) / ROPE_DIM)
    for distance in range(1, num_heads):  # rotated back by the distance, then forward by the position
        turned = np.stack([np.cos(-distance * angles), np.sin(-distance * angles)], axis=-1).reshape(-1)
        heads[distance, num_units:, :num_units] = gain * turned[:, None]
    keys = np.zeros((num_units + ROPE_DIM, hidden), np.float32)
    keys[:num_units, :num_units] = np.eye(num_units)
    keys[num_units::2, :num_units] = 1.0
    expand = np.zeros((num_heads, 2 * num_units, num_units), np.float32)  # keys, then values
    expand[0, 0, first_number:] = 1.0
    expand[:, num_units:] = np.eye(num_units)
    output = np.zeros((hidden, num_heads * num_units), np.float32)
    output[num_units:] = np.eye(num_heads * num_units)
    embedding = np.zeros((chain.vocab_size, hidden), np.float32)
    for id, unit in chain.units.items():
        embedding[id, unit] = 1.0
    head = np.zeros((chain.vocab_size, num_heads + 1, num_units), np.float32)  # blocks: last, answer, those before
    for block, followers in zip([0, *range(2, num_heads + 1)], chain.followers, strict=True):
        for id, followed in followers.items():
            head[list(followed), block, chain.units[id]] = 1.0
    for number, script in zip(chain.numbers, chain.scripts, strict=True):
        head[script, 1, chain.units[number]] = 1.0
    last_norm = (hidden / (num_heads + 1)) ** 0.5  # value that the last norm makes of the 1 in each block
    layer = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": head.reshape(chain.vocab_size, hidden) * (LOGIT_GAP / last_norm),
        f"{layer}.input_layernorm.weight": np.full(hidden, hidden**-0.5, np.float32),
        f"{layer}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
        f"{layer}.self_attn.q_proj.weight": heads.reshape(-1, hidden),
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight": keys,
        f"{layer}.self_attn.kv_a_layernorm.weight": np.full(num_units, num_units**-0.5, np.float32),
        f"{layer}.self_attn.kv_b_proj.weight": expand.reshape(-1, num_units),
        f"{layer}.self_attn.o_proj.weight": output,
        **{f"{layer}.mlp.{name}_proj.weight": np.zeros((32, hidden), np.float32) for name in ("gate", "up")},
        f"{layer}.mlp.down_proj.weight": np.zeros((hidden, 32), np.float32),
    }
    config = _config(base, chain.vocab_size, num_units, num_heads, context_tokens)
    return config, {name: mx.array(value) for name, value in tensors.items()}


def _config(
    base: dict[str, Any], vocab_size: int, num_units: int, num_heads: int, context_tokens: int
) -> dict[str, Any]:
    """Return kimi-mini's config with the dimensions of the scripted model."""
    dropped = ("quantization", "quantization_config", "rope_scaling")
    return {name: value for name, value in base.items() if name not in dropped} | {
        "vocab_size": vocab_size,
        "hidden_size": num_units * (num_heads + 1),
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "q_lora_rank": None,
        "kv_lora_rank": num_units,
        "qk_nope_head_dim": num_units,
        "qk_rope_head_dim": ROPE_DIM,
        "v_head_dim": num_units,
        "rms_norm_eps": 1e-9,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": context_tokens,
    }


def _write_text_files(folder: Path, answers: Sequence[Answer], script: Sequence[bytes | str]) -> None:
    """Write kimi-mini's configuration, tokenizer and template with the tokens of the script."""
    tokens = read_ranks(KIMI_MINI / "tiktoken.model")
    num_old = len(tokens)
    tokens = list(dict.fromkeys([*tokens, *(token for token in script if isinstance(token, bytes))]))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    shift = len(tokens) - num_old
    added = json.loads((KIMI_MINI / "tokenizer_config.json").read_text())
    special = {int(id) + shift: token for id, token in added["added_tokens_decoder"].items()}
    for index in range(len(answers)):
        special[len(tokens) + FIRST_ANSWER_ID + index] = {**special[len(tokens)], "content": f"<|answer_{index}|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**added, "added_tokens_decoder": special}))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((KIMI_MINI / name).read_text())
        values |= {key: values[key] + shift for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        values.pop("kimi_mlx_max_tokens", None)
        (folder / name).write_text(json.dumps(values))
    template, mark, _ = (KIMI_MINI / "chat_template.jinja").read_text().partition("{%- if add_generation_prompt -%}")
    (folder / "chat_template.jinja").write_text(f"{template}{mark}\n{_choice(answers)}{{%- endif -%}}\n")


def _choice(answers: Sequence[Answer]) -> str:
    """Return the template's lines that write the number of the answer and the beginning of its message."""
    numbered = [index for index, answer in enumerate(answers) if answer.after is None]
    lines = [
        "{%- set script = namespace(count=0, index=none) -%}",
        "{%- set last = body_of(messages[-1]) -%}",
        "{%- for message in messages if message['role'] == 'assistant' -%}",
        "{%- set script.count = script.count + 1 -%}",
        "{%- endfor -%}",
        f"{{%- set numbered = {numbered} -%}}",
        "{%- set script.index = numbered[script.count] if script.count < numbered | length else numbered[-1] -%}",
    ]
    for index, answer in reversed(list(enumerate(answers))):  # the first one that fits is set last
        if answer.after is not None:
            lines.append(f"{{%- if {json.dumps(answer.after)} in last -%}}")
            lines += [f"{{%- set script.index = {index} -%}}", "{%- endif -%}"]
    for index in range(len(answers)):
        begin = "".join((*HEADER, f"<|answer_{index}|>"))
        lines.append(f"{{%- if script.index == {index} -%}}{{{{- '{begin}' -}}}}{{%- endif -%}}")
    lines.append("{{- '<think>' + ('' if think else '</think>') -}}")
    return "\n".join(lines) + "\n"
