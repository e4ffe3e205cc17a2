"""lm-evaluation-harness against the server: a task from local files, through both APIs, with the package from PyPI.

By hand: `scripts/test -m clients tests/server/test_lm_eval.py`; `uv` fetches lm-eval into an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import kimi_mlx
from tests.server.running_server import RunningServer

pytestmark = pytest.mark.clients

LM_EVAL = "lm_eval[api]==0.4.13"

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "London", "a toy"], "answer": 0},
    {"question": "One two three", "choices": ["four", "banana 🍌", "¿qué?"], "answer": 0},
    {"question": "Hello, I am", "choices": ["Kimi", "a toy model of Kimi, with few words", "x"], "answer": 0},
]

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

GENERATE = """
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 16, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Return a folder with the tasks."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "choices.yaml").write_text(CHOICES.format(data=data))
    (tmp_path / "answers.yaml").write_text(GENERATE.format(data=data))
    return tmp_path


def evaluate(tasks: Path, task: str, model: str, address: str, *options: str, **arguments: str) -> list[Any]:
    """Run a task; return its samples."""
    values = {"model": "default", "base_url": address, "num_concurrent": "3", "max_length": "512", **arguments}
    command = ["uv", "tool", "run", "--python", sys.executable, "--from", LM_EVAL, "lm_eval", "run"]
    command += ["--model", model, "--tasks", task, "--include_path", str(tasks), "--log_samples", *options]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in values.items())]
    output = tasks / "output"
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "home")}
    environment.pop("PYTHONPATH", None)
    environment["OPENAI_API_KEY"] = "any"
    result = subprocess.run(
        [*command, "--output_path", str(output)], capture_output=True, text=True, timeout=500, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (samples,) = output.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def loglikelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Return the log probability of a continuation, and whether it is greedy, as lm-eval defines them."""
    ids, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    logits = np.array(model(mx.array([ids]))[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    rows = logprobs[start - 1 : -1]
    return float(rows[range(len(rows)), ids[start:]].sum()), rows.argmax(axis=-1).tolist() == ids[start:]


@pytest.mark.parametrize("arguments", [{}, {"batch_size": "4"}])
def test_loglikelihoods_are_those_of_the_model(running: RunningServer, tasks: Path, arguments: dict[str, str]) -> None:
    options: Sequence[str] = [f"--{name}={value}" for name, value in arguments.items()]
    address = f"{running.url}/v1/completions"
    samples = evaluate(tasks, "local_choices", "local-completions", address, *options, tokenizer_backend="remote")
    assert len(samples) == len(QUESTIONS)
    model, tokenizer = kimi_mlx.load("kimi-mini")
    for sample in samples:
        for number, choice in enumerate(sample["doc"]["choices"]):
            found, is_greedy = sample["filtered_resps"][number]
            expected = loglikelihood(model, tokenizer, sample["doc"]["question"], f" {choice}")
            assert float(found) == pytest.approx(expected[0], abs=1e-4)
            assert str(is_greedy) == str(expected[1])


def test_answers_of_both_apis(running: RunningServer, tasks: Path) -> None:
    for model, path, options in (
        ("local-completions", "completions", {"tokenizer_backend": "remote"}),
        ("local-chat-completions", "chat/completions", {}),
    ):
        folder = tasks / model
        folder.mkdir()
        for file in tasks.glob("*.yaml"):
            (folder / file.name).write_text(file.read_text())
        chat = ["--apply_chat_template"] if "chat" in model else []
        samples = evaluate(folder, "local_answers", model, f"{running.url}/v1/{path}", *chat, **options)
        assert len(samples) == len(QUESTIONS)
        assert all(sample["filtered_resps"][0] for sample in samples)
