"""The serving benchmark: its statistics, and a small real run with badly behaved clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kimi_mlx.bench.machine import OURS, machine, versions
from kimi_mlx.errors import UsageError
from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.text.tokenizer import Tokenizer
from scripts.serving.bad_clients import BadClientOptions
from scripts.serving.client import RequestRecord
from scripts.serving.files import MINI, serving_checkpoint
from scripts.serving.load import ServingRun, measure_serving
from scripts.serving.prompts import WORKLOADS, TokenRange, Workload, random_text
from scripts.serving.report import ServingReport
from scripts.serving.results import memory_growth_bytes, same_texts, serving_ratios, serving_rows
from scripts.serving.servers import ServerUnderTest
from tests.server.running_server import serving

TWO = TokenRange(2, 2)


def record(number: int, at: float, *, turn: int = 0, text: str = "a", error: str | None = None) -> RequestRecord:
    """Return an answer of 3 tokens: the first after 0.1 s, the next ones 0.01 s and 0.03 s later."""
    arrivals = [] if error else [at + 0.1, at + 0.11, at + 0.14]
    return RequestRecord(number, turn, 3, at, arrivals, at + 0.15, text, 10, 4, 0 if error else 3, error)


def run(side: str, repetition: int, wall_s: float, *records: RequestRecord) -> ServingRun:
    return ServingRun(side, repetition, records, wall_s, (100, 150, 150, 151))


def test_rates_are_all_tokens_over_wall_time_and_warm_ups_do_not_count() -> None:
    warmup = run(OURS, -1, 100.0, record(0, 0))
    runs = [warmup, run(OURS, 0, 2.0, record(0, 0), record(1, 0, error="HTTP 429"), record(1, 1))]
    (row,) = serving_rows(runs)
    assert (row.requests, row.errors, row.new_tokens) == (3, {"HTTP 429": 1}, 6)
    assert row.tok_per_s.median == 3.0
    assert row.requests_per_s.median == 1.5
    assert row.ttft_s[0] is not None
    assert row.ttft_s[0].p50 == pytest.approx(0.1)
    assert row.inter_token_s is not None
    assert row.inter_token_s.p50 == pytest.approx(0.02)
    assert memory_growth_bytes(row) == 0


def test_ratios_compare_adjacent_runs() -> None:
    runs = [
        run(OURS, 0, 1.0, record(0, 0)),
        run("mlx-lm", 0, 2.0, record(0, 0)),
        run("mlx-lm", 1, 30.0, record(0, 0)),
        run(OURS, 1, 10.0, record(0, 0)),
    ]
    rate, ttft, late = serving_ratios(runs)
    assert (rate.figure, rate.ratio.min, rate.ratio.max) == ("tok_per_s", 2.0, pytest.approx(3.0))
    assert (ttft.figure, ttft.ratio.median) == ("p50 ttft_s turn 1", pytest.approx(1.0))
    assert late.figure == "p90 ttft_s turn 1"


def test_texts_for_the_same_prompt_are_compared() -> None:
    runs = [run(OURS, 0, 1.0, record(0, 0), record(1, 0)), run("other", 0, 1.0, record(0, 0, text="b"))]
    (agreement,) = same_texts(runs)
    assert (agreement.side, agreement.answers, agreement.equal) == ("other", 1, 0)


def test_the_agents_of_a_repetition_share_a_prefix_that_no_earlier_one_had() -> None:
    agents = WORKLOADS["agents"]
    prompts = [agents.system_prompt(repetition) for repetition in range(-1, 3)]
    assert len(set(prompts)) == len(prompts)
    assert prompts[0] == agents.system_prompt(-1)
    assert agents.requests == agents.clients == 100
    assert WORKLOADS["agents"].system_prompt(0) != replace(agents, seed=1).system_prompt(0)
    constant = replace(agents, has_new_prefix=False)
    assert constant.system_prompt(0) == constant.system_prompt(1)


def test_random_text_has_one_token_per_word() -> None:
    text = random_text(50, 1, 2)
    assert text == random_text(50, 1, 2) != random_text(50, 1, 3)
    assert len(Tokenizer.load(MINI).encode(text)) == 50


def test_lengths_are_sampled_from_ranges() -> None:
    load = Workload(prompt_tokens=TokenRange.parse("3-9"), answer_tokens=TokenRange.parse("4"))
    messages = [load.user_message(0, number, 0) for number in range(50)]
    assert messages == [load.user_message(0, number, 0) for number in range(50)]
    assert {len(text.split()) for text, _ in messages} == set(range(3, 10))
    assert {tokens for _, tokens in messages} == {4}
    with pytest.raises(UsageError, match="not a number"):
        TokenRange.parse("few")


def test_a_workload_without_clients_is_refused() -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        Workload(clients=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUnderTest]:
    """Serve the comparison checkpoint of kimi-mini in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = serving_checkpoint("kimi-mini")
        assert serving_checkpoint("kimi-mini") == folder
    session = open_session(SessionOptions(folder))
    try:
        with serving(session) as running:
            yield ServerUnderTest(OURS, running.url)
    finally:
        session.close()


def test_two_clients_of_a_real_server(served: ServerUnderTest) -> None:
    load = Workload(
        clients=2,
        conversations=3,
        turns=2,
        prompt_tokens=TokenRange(15, 25),
        later_tokens=TokenRange(5, 5),
        answer_tokens=TWO,
    )
    progress: list[str] = []
    runs = measure_serving([served], load, 0, 1, progress=lambda side, record: progress.append(side))
    (row,) = serving_rows(runs)
    assert (row.requests, row.errors, progress) == (6, {}, [OURS] * 6)
    assert row.new_tokens == row.requested_tokens == 6 * 2
    assert len(row.ttft_s) == 2
    assert row.cached_tokens >= 3 * 15  # the second turns reuse the first
    settings = {"model": "kimi-mini", "machine": machine(), "versions": versions()}
    report = ServingReport(load, settings, runs, {OURS: served.health()})
    assert json.loads(json.dumps(report.to_dict()))["results"][0]["requests"] == 6
    assert "running 0, waiting 0" in report.markdown()


def test_answers_without_streams(served: ServerUnderTest) -> None:
    (run,) = measure_serving([served], Workload(2, 2, answer_tokens=TWO, stream=False), 0, 1)
    assert [record.error for record in run.records] == [None, None]
    assert all(len(record.arrivals) == 1 and record.new_tokens == 2 for record in run.records)


@pytest.mark.slow
def test_bad_clients_do_not_affect_the_others(served: ServerUnderTest) -> None:
    misbehaviour = BadClientOptions(aborts=4, slow_readers=1, prompt_tokens=5, answer_tokens=50, slow_s=0.5)
    (run,) = measure_serving(
        [served], Workload(1, 2, prompt_tokens=TokenRange(10, 10), answer_tokens=TWO), 0, 1, misbehaviour
    )
    assert run.bad_client_result is not None
    assert (run.bad_client_result.aborted, run.bad_client_result.slow_reads, run.bad_client_result.errors) == (4, 1, ())
    assert [record.error for record in run.records] == [None, None]
    assert served.health_when_idle()["running"] == 0
