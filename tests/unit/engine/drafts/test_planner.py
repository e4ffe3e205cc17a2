"""The planner in simulated time: it never loses, and gains nearly all that can be gained."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from kimi_mlx.engine.drafts import planner as planner_module
from kimi_mlx.engine.drafts import step_times
from kimi_mlx.engine.drafts.drafter import Draft, Offer
from kimi_mlx.engine.drafts.planner import DraftPlanner
from kimi_mlx.engine.drafts.prompt_lookup import PromptLookup
from kimi_mlx.engine.drafts.records import DraftRecords
from kimi_mlx.engine.drafts.step_times import Load, StepTimes
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sequence import Sequence as EngineSequence
from kimi_mlx.engine.step_runner import InFlightStep
from kimi_mlx.engine.token_sampler import TokenSampler

MAX_TOKENS = 7
SWITCH_S = 0.0005
"""Time in which nothing is computed, because a step is launched after the results of the one before."""

StepSeconds = Callable[[int], float]
"""Function from the number of tokens of a step to its time."""


@dataclass
class Simulation:
    """A batch whose steps take a given time.

    Args:
        step_s: time of steps.
        acceptance: function from the number of generated tokens to the probability that a draft token is accepted.
        token_s: time of the draft model for a token.
        noise: standard deviation of the logarithm of a step's time.
    """

    step_s: StepSeconds
    acceptance: Callable[[int], float]
    token_s: float = 0.0005
    noise: float = 0.0
    seed: int = 0
    now: float = 0.0
    num_drafted: int = 0
    num_steps_with_drafts: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def offer(self, sequence: EngineSequence, limit: int) -> Offer | None:
        return Offer("draft model", limit)

    def draft(self, requests: Sequence[tuple[EngineSequence, Offer, int]]) -> list[Draft]:
        self.now += self.token_s * max(length for _, _, length in requests)
        self.num_drafted += sum(length for _, _, length in requests)
        return [(0,) * length for _, _, length in requests]

    def observe(self, step: InFlightStep) -> None:
        pass

    def run(self, planner: DraftPlanner, sequences: list[EngineSequence]) -> float:
        """Generate all tokens of some sequences that are as long as each other; return the time."""
        began, is_drafting = self.now, False
        while running := [each for each in sequences if each.remaining_tokens > 0]:
            load = Load.of([len(each.tokens) for each in running], others_decode=False)
            tokens = len(running) + sum(len(each.draft) for each in running)
            self.now += self._seconds(tokens)
            planner.clock.on_results(load, tokens, is_drafting)
            for each in running:
                self._append(planner, each)
            left = [each for each in running if each.remaining_tokens > 0]
            if not left:
                continue
            if not is_drafting:
                is_drafting = planner.wants_decision(left, False)
                continue
            decision = planner.decide(left, False)
            self.now += SWITCH_S
            for each, draft in zip(left, decision.drafts, strict=True):
                each.draft = draft
            self.num_steps_with_drafts += any(decision.drafts)
            is_drafting = decision.is_drafting
        return self.now - began

    def _seconds(self, tokens: int) -> float:
        noise = self.random.lognormvariate(0, self.noise) * (20 if self.noise and self.random.random() < 0.02 else 1)
        return self.step_s(tokens) * noise

    def _append(self, planner: DraftPlanner, sequence: EngineSequence) -> None:
        count, chance = 0, self.acceptance(sequence.generated)
        while count < len(sequence.draft) and self.random.random() < chance:
            count += 1
        accepted = [*sequence.draft[:count], 1]
        planner.on_verified(sequence, accepted)
        sequence.draft = ()
        list(sequence.append(accepted, [None] * len(accepted)))


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulation]:
    def make(*args: object, **options: object) -> Simulation:
        simulation = Simulation(*args, **options)  # pyright: ignore[reportArgumentType]
        for module in (step_times, planner_module):
            monkeypatch.setattr(module.time, "perf_counter", lambda: simulation.now)
        return simulation

    return make


def make_sequences(count: int, num_tokens: int, prompt: Sequence[int] = (1, 2, 3)) -> list[EngineSequence]:
    request = Request(tuple(prompt), num_tokens)
    return [EngineSequence(number, request, num_tokens, TokenSampler(request, 0, None)) for number in range(count)]


def make_planner(simulation: Simulation, start: StepSeconds | None = None) -> tuple[DraftPlanner, DraftRecords]:
    times = StepTimes()
    times.set_start_times({count: (start or simulation.step_s)(count) for count in (1, 2, 4, 8)})
    records = DraftRecords(times)
    return DraftPlanner([simulation], records, MAX_TOKENS), records


def flat(tokens: int) -> float:
    """Links or fences take most of the time."""
    return 0.04 + 0.001 * tokens


def middle(tokens: int) -> float:
    """Experts are read for each token, the rest once."""
    return 0.02 + 0.008 * tokens


def steep(tokens: int) -> float:
    """Each token takes as long as the first."""
    return 0.02 * tokens


def best_time(simulation: Simulation, chance: float, count: int, num_tokens: int) -> float:
    """Return the expected time with the best fixed length of drafts."""
    times = [num_tokens * simulation.step_s(count)]
    for length in range(1, MAX_TOKENS + 1):
        expected = sum(chance**index for index in range(length + 1))
        step_s = simulation.step_s(count * (1 + length)) + length * simulation.token_s + SWITCH_S
        times.append(num_tokens / expected * step_s)
    return min(times)


@pytest.mark.parametrize("step_s", [flat, pytest.param(middle, marks=pytest.mark.slow), steep])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("noise", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_wrong_drafts_cost_nothing(
    simulate: Callable[..., Simulation], step_s: StepSeconds, count: int, noise: float
) -> None:
    simulation = simulate(step_s, lambda at: 0.0, noise=noise)
    planner, records = make_planner(simulation)
    num_tokens = 600
    took = simulation.run(planner, make_sequences(count, num_tokens))
    assert simulation.num_steps_with_drafts <= (50 if step_s is flat else 20)
    assert simulation.num_drafted <= 80 * count
    assert records.off_reason is not None
    drafted = simulation.num_drafted
    again = simulation.run(planner, make_sequences(count, num_tokens))  # what was learned holds for the next answer
    assert simulation.num_drafted - drafted <= 50 * count
    if not noise:
        assert took <= 1.03 * num_tokens * step_s(count)
        assert again <= 1.01 * num_tokens * step_s(count)


@pytest.mark.parametrize("step_s", [flat, middle, steep])
@pytest.mark.parametrize("chance", [0.4, 0.7, 0.9])
def test_right_drafts_gain_nearly_all_that_is_possible(
    simulate: Callable[..., Simulation], step_s: StepSeconds, chance: float
) -> None:
    simulation = simulate(step_s, lambda at: chance)
    planner, records = make_planner(simulation)
    num_tokens = 2000
    took = simulation.run(planner, make_sequences(1, num_tokens))
    assert took <= 1.08 * best_time(simulation, chance, 1, num_tokens)
    assert took <= 1.03 * num_tokens * step_s(1)
    if step_s is not steep and chance > 0.5:
        assert records.num_accepted > 500
    if step_s is steep:
        assert took <= 1.01 * num_tokens * step_s(1)
        assert simulation.num_steps_with_drafts <= 100
        assert records.off_reason is not None
        assert "a step of 4 tokens takes 4.0 times as long as one of 1" in records.off_reason


def test_drafts_return_when_they_are_accepted_again(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate(flat, lambda at: 0.8 if at < 200 or at > 500 else 0.0)
    planner, _ = make_planner(simulation)
    took = simulation.run(planner, make_sequences(1, 1000))
    ideal = best_time(simulation, 0.8, 1, 700) + 300 * flat(1)
    assert took < 1.15 * ideal


def test_times_of_the_start_are_corrected_by_those_of_steps(simulate: Callable[..., Simulation]) -> None:
    for start, truth in ((flat, steep), (steep, flat)):
        simulation = simulate(truth, lambda at: 0.8)
        planner, _ = make_planner(simulation, start)
        took = simulation.run(planner, make_sequences(1, 2000))
        assert took <= 1.15 * best_time(simulation, 0.8, 1, 2000)
        assert took <= 1.03 * 2000 * truth(1)


def test_prompt_lookup_is_compared_with_the_text_at_no_cost(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate(middle, lambda at: 0.0)
    _, records = make_planner(simulation)
    planner = DraftPlanner([PromptLookup()], records, MAX_TOKENS)
    texts = [[number % 7, number % 11, number] for number in range(100, 300)]  # pairs return, with another third token
    prompt = [token for text in texts for token in text]
    (sequence,) = make_sequences(1, 2000, prompt)
    num_offers = num_drafted = 0
    is_drafting = False
    for text in texts:
        for token in (*text[:2], 1000 + text[2]):
            planner.on_verified(sequence, [token])
            list(sequence.append([token], [None]))
            simulation.now += middle(1 + len(sequence.draft))
            load = Load.of([len(sequence.tokens)], False)
            planner.clock.on_results(load, 1 + len(sequence.draft), is_drafting)
            sequence.draft = ()
            num_offers += PromptLookup().offer(sequence, 1) is not None
            if is_drafting:
                decision = planner.decide([sequence], False)
                sequence.draft, is_drafting = decision.drafts[0], decision.is_drafting
            else:
                is_drafting = planner.wants_decision([sequence], False)
            num_drafted += bool(sequence.draft)
    assert num_offers > 150
    assert num_drafted <= 10


def test_a_batch_gets_drafts_for_those_whose_drafts_are_accepted(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate(lambda tokens: 0.04 + 0.006 * tokens, lambda at: 0.85)
    planner, records = make_planner(simulation)
    good, bad = make_sequences(2, 400)
    for _ in range(40):
        records.times.add(Load.of([3, 3], False), 2, 0.052)
        records.acceptance(bad.drafts, "draft model").record(4, 0)
        records.acceptance(good.drafts, "draft model").record(4, 4)
    decision = planner.decide([good, bad], False)
    assert len(decision.drafts[0]) >= 4
    assert not decision.drafts[1]


def test_many_sequences_get_no_drafts(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate(flat, lambda at: 1.0)
    planner, records = make_planner(simulation)
    took = simulation.run(planner, make_sequences(100, 200))
    assert not simulation.num_drafted
    assert took == pytest.approx(200 * flat(100))
    assert records.off_reason == "a step of 100 answers has no room for drafts"
