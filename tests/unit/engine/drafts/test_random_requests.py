"""Random requests with kimi-mini's draft model, and with one whose logits are NaN: the text is that without drafts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import pytest

from kimi_mlx.engine import engine as engine_module
from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.grammars import open_grammar_compiler
from kimi_mlx.runtime.load import load_draft_model, load_share
from kimi_mlx.sizing import engine_limits
from kimi_mlx.text.grammar import build_grammar, detect_thinking
from tests.drafters import RandomPlanner
from tests.fakes import KIMI_MINI
from tests.unit.engine.drafts.test_modes import Answers, answer

TEXTS = ("Tell me about the sea.", "hi", "Write Python code that adds two numbers.", "2+3?")
SCHEMAS = ({"enum": ["yes", "no"]}, {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[1]}} for name in ("add", "address")]
CACHE_TOKENS = 1024
"""Size of the small caches, in which requests are preempted."""

TOKENIZER = ChatTokenizer.load(KIMI_MINI)


def random_request(rng: random.Random) -> Request:
    special = TOKENIZER.tokenizer.special_tokens
    prompt = tuple(TOKENIZER.apply_chat_template([{"role": "user", "content": rng.choice(TEXTS)}]))
    if rng.random() < 0.2:
        prompt = tuple(rng.randrange(1792) for _ in range(rng.choice((1, 16, 65, 200))))
    grammar = None
    if rng.random() < 0.4:
        grammar = build_grammar(special, detect_thinking(special, prompt), rng.choice(SCHEMAS))
    bias = ((rng.randrange(1792), 5.0),) if rng.random() < 0.3 else ()
    if rng.random() < 0.3:  # calls, by the choice of the model or required
        choice = rng.choice(("auto", "required"))
        grammar = build_grammar(special, detect_thinking(special, prompt), tools=TOOLS, tool_choice=choice)
        bias = ((special["<|tool_calls_section_begin|>"], 20.0),)
    sampling = Sampling(rng.choice((0.3, 0.9, 1.5)), rng.choice((1, 0.9)), rng.choice((0, 40)), seed=rng.randrange(99))
    inside = rng.choice((special["</think>"], TOKENIZER.encode(".")[-1]))
    return Request(
        prompt,
        rng.choice((1, 2, 8, 20, 40)),
        sampling if rng.random() < 0.5 else Sampling(),
        TOKENIZER.stop_ids | ({inside} if rng.random() < 0.2 else set()),
        bias,
        rng.choice((None, None, 0, 2)),
        grammar,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(4, 10))])
def test_random_requests_have_the_text_of_no_drafts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_limits, "MIN_CACHE_TOKENS", 0)
    config = load_config(KIMI_MINI)
    model = load_share(KIMI_MINI, config, "float32")
    draft = load_draft_model(KIMI_MINI.parent / "kimi-mini-draft", model)
    constrain = partial(Constraint, open_grammar_compiler(KIMI_MINI, config.vocab_size))
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(5)]
    cache_bytes = CACHE_TOKENS * (len(model.layers) + 1) * 96 * 4 if rng.random() < 0.5 else None

    def answers_of(speculate: int) -> Answers:
        engine = Engine(
            model,
            prefill_chunk=64,
            speculate=speculate,
            draft_model=draft if speculate else None,
            constrain=constrain,
            cache_bytes=cache_bytes,
        )
        return answer(engine, requests, at_once=3)

    expected = answers_of(0)
    monkeypatch.setattr(engine_module, "DraftPlanner", RandomPlanner)
    model.capture(draft.captured_layers)
    norms: Sequence[mx.array] = (draft.norm, mx.full(draft.norm.shape, mx.nan))
    for norm in norms:
        draft.norm = norm
        assert answers_of(rng.choice((1, 3, 7))) == expected
