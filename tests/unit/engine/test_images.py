"""Images in prompts: any chunk, batches, drafts, caches, budget, cancellation and errors, on a tiny real tower."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.engine import engine as engine_module
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Encoded, Event, Finished, Token
from kimi_mlx.engine.feature_store import Features, FeatureStore
from kimi_mlx.engine.kv_cache_pool import shape_of
from kimi_mlx.engine.prompt_cache.block_file import chain, root_of
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.engine.request import ImageInput, Request
from kimi_mlx.errors import EngineError, KimiMlxError, StepError, VisionError
from kimi_mlx.model import vision
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.image_rows import ImageRows
from kimi_mlx.runtime.load import load_draft_model
from kimi_mlx.sizing import engine_limits
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import load_golden, text_config, write_checkpoint
from tests.drafters import RandomPlanner
from tests.drafts import draft_config, write_draft
from tests.examples import examples
from tests.images import make_image, make_prompt

GOLDEN = load_golden("k2.5")
TEXT = [int(id) for id in GOLDEN.input_ids[0, :40]]
A, B, C = make_image(1), make_image(2, (1, 6, 4)), make_image(3, (2, 4, 4))

Greedy = Callable[[Request, int], list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("k2.5"), GOLDEN.config, GOLDEN.seed)
    model = load_model(folder, load_config(folder), mx.float32)
    assert model.vision is not None
    embed = model.vision.patch_embed
    embed.weight = 10 * embed["weight"]  # else the features hardly depend on the pixels
    mx.eval(embed.parameters())
    return model


@pytest.fixture(scope="module")
def greedy(model: Model) -> Greedy:
    """Decode without a cache: run the whole sequence, with its images, for each token."""
    answers: dict[Request, list[int]] = {}

    def answer(request: Request, count: int) -> list[int]:
        tokens = answers.setdefault(request, [])
        rows = [
            ImageRows(image.start, model.image_features(mx.array(image.patches), [image.grid]))
            for image in request.images
            if image.patches is not None
        ]
        while len(tokens) < count:
            ids = mx.array([[*request.prompt, *tokens]])
            hidden = model.hidden(ids, [SequenceSlice(model.make_cache(), ids.shape[1])], rows)
            tokens.append(mx.argmax(model.logits(hidden)[0, -1]).tolist())  # pyright: ignore[reportArgumentType]
        return tokens[:count]

    return answer


def request_of(*parts: Sequence[int] | ImageInput, count: int = 6) -> Request:
    prompt, images = make_prompt(*parts)
    return Request(prompt, max_tokens=count, images=images)


def run(engine: Engine, request: Request) -> tuple[list[int], Finished, int]:
    """Return the new tokens, the final event, and the number of parts that the tower computed."""
    events = events_of(engine, request)
    end = events[-1]
    assert isinstance(end, Finished)
    tokens = [event.id for event in events if isinstance(event, Token)]
    return tokens, end, sum(isinstance(event, Encoded) for event in events)


def events_of(engine: Engine, request: Request) -> list[Event | KimiMlxError]:
    """Return the events of a request, within a limit of steps."""
    engine.add(0, request)
    events: list[Event | KimiMlxError] = []
    for _ in range(1000):
        events += [event for _, event in engine.step()]
        if engine.is_idle:
            return events
    raise AssertionError("the engine makes no progress")


def logprobs_of(engine: Engine, request: Request) -> list[float]:
    """Return the log probability of each token of an answer."""
    events = events_of(engine, request)
    return [event.logprobs.token for event in events if isinstance(event, Token) and event.logprobs is not None]


@dataclass
class Answers:
    """Events of several requests, by request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, Finished | KimiMlxError] = field(default_factory=dict)
    encoded: list[int] = field(default_factory=list)

    def take(self, engine: Engine) -> None:
        """Run a step."""
        for request_id, event in engine.step():
            if isinstance(event, Token):
                self.tokens.setdefault(request_id, []).append(event.id)
            elif isinstance(event, Encoded):
                self.encoded.append(request_id)
            elif isinstance(event, Finished | KimiMlxError):
                self.ends[request_id] = event

    def take_all(self, engine: Engine) -> None:
        """Run until the engine is idle."""
        for _ in range(2000):
            if engine.is_idle:
                return
            self.take(engine)
        raise AssertionError("the engine makes no progress")


MIXED = request_of(TEXT[:5], A, TEXT[5:9], B, C, TEXT[9:30])


@pytest.mark.parametrize("chunk", [1, 4, 7, 512])
def test_any_chunk_of_a_prompt_with_images_gives_the_same_text(model: Model, greedy: Greedy, chunk: int) -> None:
    assert run(Engine(model, prefill_chunk=chunk), MIXED)[0] == greedy(MIXED, 6)


@pytest.mark.parametrize("parts", [(A,), (A, A), (TEXT[:3], A), (A, TEXT[:3])])
def test_images_at_the_ends_of_a_prompt(
    model: Model, greedy: Greedy, parts: tuple[Sequence[int] | ImageInput, ...]
) -> None:
    engine = Engine(model, prefill_chunk=4)
    request = request_of(*parts)
    assert run(engine, request)[0] == greedy(request, 6)
    tokens, end, num_parts = run(engine, request)
    assert (tokens, num_parts) == (greedy(request, 6), 0)
    assert end.statistics.cached_tokens == len(request.prompt) - 1


def test_other_images_change_the_text_and_share_no_cache_from_the_first_one_on(model: Model, greedy: Greedy) -> None:
    engine = Engine(model)
    first, second = request_of(TEXT[:8], A, [1]), request_of(TEXT[:8], make_image(9), [1])
    assert first.prompt == second.prompt
    assert greedy(first, 6) != greedy(second, 6)
    assert [run(engine, request)[0] for request in (first, second)] == [greedy(first, 6), greedy(second, 6)]
    _, end, num_parts = run(engine, request_of(TEXT[:8], make_image(10), [1]))
    assert end.statistics.cached_tokens == 8
    assert num_parts > 0


def test_the_same_image_in_another_prompt_is_not_encoded_again(model: Model, greedy: Greedy) -> None:
    engine = Engine(model)
    assert run(engine, request_of(TEXT[:8], A))[2] > 0
    request = request_of(TEXT[3:7], A, TEXT[:5])
    tokens, end, num_parts = run(engine, request)
    assert (tokens, end.statistics.cached_tokens, num_parts) == (greedy(request, 6), 0, 0)


def test_progress_and_statistics_of_encoding(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "TUNINGS", {"cpu": replace(model.tuning, encode_multiply_adds=1)})
    events = list(Engine(model).generate(request_of(TEXT[:4], A, B)))
    layers = GOLDEN.config["vision_config"]["vt_num_hidden_layers"]
    assert [event for event in events if isinstance(event, Encoded)] == [
        Encoded(image, 2, done, layers) for image, done in itertools.product((1, 2), range(1, layers + 1))
    ]
    end = events[-1]
    assert isinstance(end, Finished)
    assert 0 < end.statistics.encode_s < end.statistics.ttft_s


@pytest.mark.slow
def test_text_is_the_same_in_a_batch_with_text_only_prompts(model: Model, greedy: Greedy) -> None:
    engine, answers = Engine(model, prefill_chunk=8), Answers()
    requests = [
        request_of(TEXT[:11], count=12),
        request_of(TEXT[:5], A, TEXT[5:9], B, count=5),
        request_of(TEXT[2:30], count=4),
        request_of(A, TEXT[3:8], count=5),
        request_of(TEXT[:5], A, TEXT[5:9], C, count=5),
    ]
    for request_id, request in enumerate(requests):
        engine.add(request_id, request)
        answers.take(engine)
    answers.take_all(engine)
    for request_id, request in enumerate(requests):
        assert answers.tokens[request_id] == greedy(request, request.max_tokens or 0)


@pytest.mark.slow
def test_several_answers_to_one_prompt_encode_its_image_once(model: Model, greedy: Greedy) -> None:
    engine, answers = Engine(model, prefill_chunk=8), Answers()
    request = request_of(TEXT[:5], A, TEXT[5:30])
    for request_id in range(3):
        engine.add(request_id, request)
    answers.take_all(engine)
    assert all(answers.tokens[request_id] == greedy(request, 6) for request_id in range(3))
    assert answers.encoded == [0, 1, 2]  # one part, for which all three wait


@pytest.mark.slow
def test_drafts_from_prompts_with_images(model: Model, greedy: Greedy) -> None:
    repeated = request_of(TEXT[:6], A, TEXT[:6], A, TEXT[:6], count=16)
    engine = Engine(model, speculate=4, prefill_chunk=5)
    assert run(engine, repeated)[0] == greedy(repeated, 16)


@pytest.mark.slow
def test_a_draft_model_reads_prompts_with_images(
    model: Model, greedy: Greedy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "DraftPlanner", RandomPlanner)
    config = draft_config(text_config(GOLDEN.config), eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]})
    draft = load_draft_model(write_draft(tmp_path, config), model)
    model.capture(draft.captured_layers)
    requests = [request_of(TEXT[:5], A, TEXT[5:30], count=12), request_of(TEXT[:9], B, A, TEXT[2:5], count=20)]
    engine, answers = Engine(model, speculate=4, prefill_chunk=5, draft_model=draft), Answers()
    for request_id, request in enumerate(requests):
        engine.add(request_id, request)
    answers.take_all(engine)
    model.capture(())
    assert [answers.tokens[0], answers.tokens[1]] == [greedy(requests[0], 12), greedy(requests[1], 20)]
    assert engine.drafts is not None
    assert engine.drafts.num_drafted > 5


@pytest.mark.slow
def test_decode_continues_while_images_are_encoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "TUNINGS", {"cpu": replace(model.tuning, encode_multiply_adds=1)})
    engine = Engine(model, prefill_chunk=8)
    engine.add(0, request_of(TEXT[:3], count=60))
    for _ in range(3):
        list(engine.step())
    engine.add(1, request_of(TEXT[:4], A, TEXT[:20], B, TEXT[:9], count=2))
    engine.add(2, request_of(TEXT[5:9], count=2))
    steps: list[list[tuple[int, type]]] = []
    while not engine.is_idle:
        steps.append([(request_id, type(event)) for request_id, event in engine.step()])
    encoding = [step for step in steps if (1, Encoded) in step]
    assert len(encoding) == 4
    assert all((0, Token) in step and step.count((1, Encoded)) == 1 for step in encoding)
    ends = [next(at for at, step in enumerate(steps) if (request_id, Finished) in step) for request_id in (2, 1)]
    assert ends == sorted(ends)  # prompts without images do not wait for the tower


def test_a_cancelled_image_is_abandoned(model: Model, greedy: Greedy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "TUNINGS", {"cpu": replace(model.tuning, encode_multiply_adds=1)})
    for steps in range(5):
        engine, answers = Engine(model, prefill_chunk=4), Answers()
        engine.add(0, request_of(TEXT[:5], A, B))
        for _ in range(steps):
            answers.take(engine)
        engine.add(1, request := request_of(TEXT[:7], A))
        engine.cancel(0)
        answers.take_all(engine)
        end = answers.ends[0]
        assert isinstance(end, Finished)
        assert end.reason == "cancelled"
        assert answers.tokens[1] == greedy(request, 6)


def test_an_error_in_the_tower_fails_only_the_requests_that_need_the_image(
    model: Model, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingEncoding(vision.Encoding):
        def step(self) -> bool:
            raise RuntimeError("[metal::malloc] Attempting to allocate 17179869184 bytes")

    engine, answers = Engine(model, prefill_chunk=8), Answers()
    engine.add(0, text := request_of(TEXT[:9], count=20))
    answers.take(engine)
    with monkeypatch.context() as patch:
        patch.setattr("kimi_mlx.engine.image_encoder.Encoding", FailingEncoding)
        engine.add(1, with_image := request_of(TEXT[:4], A))
        engine.add(2, request_of(TEXT[4:8], A))
        while 1 not in answers.ends:
            answers.take(engine)
    assert answers.ends.keys() == {1, 2}
    error = answers.ends[1]
    assert isinstance(error, StepError)
    assert "an image could not be encoded: [metal::malloc]" in error.message
    assert "smaller image" in str(error.hint)
    engine.add(3, with_image)
    answers.take_all(engine)
    assert answers.tokens == {0: greedy(text, 20), 3: greedy(with_image, 6)}


@pytest.mark.slow
def test_preempted_prompts_with_images_continue(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_limits, "MIN_CACHE_TOKENS", 0)
    layers, width = len(model.layers), model.config.kv_lora_rank + model.config.qk_rope_head_dim
    engine, answers = Engine(model, cache_bytes=768 * layers * width * 4), Answers()
    requests = [request_of(TEXT[at:], A, TEXT * 5, make_image(20 + at), count=14) for at in range(3)]
    for request_id, request in enumerate(requests):
        engine.add(request_id, request)
    answers.take_all(engine)
    alone = Engine(model)
    assert [run(alone, request)[0] for request in requests] == [answers.tokens[at] for at in range(3)]


@pytest.mark.slow
def test_features_beyond_the_budget_are_dropped_and_encoded_again(model: Model, greedy: Greedy) -> None:
    engine = Engine(model, prefill_chunk=8)
    engine._encoder._store._budget_tokens = A.num_tokens + B.num_tokens
    many = request_of(A, TEXT[:2], B, TEXT[:2], C, TEXT[:2], make_image(4), make_image(5))
    assert run(engine, many)[0] == greedy(many, 6)
    assert engine._encoder._store.num_tokens <= A.num_tokens + B.num_tokens
    engine.clear()
    tokens, _, num_parts = run(engine, many)
    assert tokens == greedy(many, 6)
    assert num_parts > 0


@given(st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 5))), max_size=20))
def test_the_store_keeps_needed_features_and_stays_within_its_budget(puts: list[tuple[int, set[int]]]) -> None:
    store = FeatureStore(10)
    for name, needed in puts:
        digests = {str(other) for other in needed} | {str(name)}
        if str(name) in store or not store.has_room(4, digests):
            continue
        kept = {digest for digest in digests if digest in store}
        store.put(str(name), Features(4, None), digests)
        assert all(digest in store for digest in kept)
        assert store.num_tokens <= 10


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_tokens": 5}, VisionError, "has 6 features, but the prompt has 5 placeholder tokens in its 5"),
        ({"start": 1}, VisionError, "has 6 features, but the prompt has 5 placeholder tokens in its 6"),
        ({"grid": (1, 3, 8)}, KimiMlxError, "must be positive multiples"),
        ({"grid": (24, 1, 1)}, KimiMlxError, "frames"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    model: Model, change: dict[str, object], error: type[KimiMlxError], words: str
) -> None:
    [image] = request_of(A, TEXT[:3]).images
    request = Request(request_of(A, TEXT[:3]).prompt, images=(replace(image, **change),))  # pyright: ignore[reportArgumentType]
    with pytest.raises(error, match=words):
        Engine(model).add(0, request)


def test_images_beyond_the_cache_are_refused_with_all_numbers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_limits, "MIN_CACHE_TOKENS", 256)
    engine, request = Engine(model, cache_bytes=1), request_of(TEXT[:9], *(A,) * 45)
    with pytest.raises(EngineError, match=r"has 279 tokens \(270 of images\), but the KV cache holds 256") as error:
        engine.add(0, request)
    assert str(error.value.hint).startswith("use fewer or smaller images, shorten the prompt")


def test_models_without_a_tower_say_why_and_what_to_do(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Engine(model).image_error is None
    with monkeypatch.context() as patch:
        patch.setattr("kimi_mlx.engine.engine.has_tower", lambda model, group: False)
        error = Engine(model).image_error
    assert error is not None
    assert "no vision tower" in error.message
    assert "kimi-mlx download" in str(error.hint)
    monkeypatch.setattr(model, "config", replace(model.config, vision=None))
    with pytest.raises(EngineError, match="does not see images"):
        Engine(model).add(0, MIXED)


@pytest.mark.slow
def test_blocks_on_disk_distinguish_images(model: Model, tmp_path: Path) -> None:
    answers: list[list[int]] = []
    all_cached: list[int] = []
    for image in (A, A, make_image(9)):
        store = BlockStore(tmp_path, "key", "share", "stamp", shape_of(model), 10**9, warn=pytest.fail)
        tokens, end, _ = run(Engine(model, blocks=store), request_of(image, TEXT * 7, count=2))
        answers.append(tokens)
        all_cached.append(end.statistics.cached_tokens)
        store.close()
    assert all_cached == [0, 256, 0]
    assert answers[0] == answers[1]


def test_names_of_text_blocks_have_not_changed() -> None:
    names = [block.name for block in chain(root_of("key"), list(range(512)))]
    assert names == ["20e53d4324e03d2770f5a04e3d966f9a", "9625d5c79f9dabd791b65bc1b9919a03"]
    key = request_of(A, list(range(512))).cache_key()
    assert [block.name for block in chain(root_of("key"), key)] != names


POOL = [make_image(30 + seed, grid) for seed, grid in enumerate([(1, 2, 2), (1, 2, 2), (1, 4, 4), (1, 4, 4)])]
TURNS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2).map(lambda at: TEXT[4 * at : 4 * at + 4])), max_size=5)


@pytest.fixture(scope="module")
def shared_engine(model: Model) -> Engine:
    """Return an engine whose caches hold the prompts of all examples so far."""
    engine = Engine(model, prefill_chunk=5)
    engine._encoder._store._budget_tokens = 8
    return engine


@pytest.mark.slow
@examples(10)
@given(conversations=st.lists(TURNS, min_size=1, max_size=3))
def test_random_conversations_with_swapped_images_answer_the_same_with_and_without_a_cache(
    model: Model, shared_engine: Engine, conversations: list[list[int | list[int]]]
) -> None:
    for parts in conversations:
        request = request_of(TEXT[:2], *(POOL[part] if isinstance(part, int) else part for part in parts), [1], count=2)
        request = replace(request, top_logprobs=1)
        assert logprobs_of(shared_engine, request) == pytest.approx(logprobs_of(Engine(model), request), abs=1e-3)
