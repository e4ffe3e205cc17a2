"""Plain completions with the `openai` package."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import openai
import pytest

from tests.server import raw
from tests.server.running_server import RunningServer

TEXT = "The capital of"


def complete(client: openai.OpenAI, prompt: Any = TEXT, **options: Any) -> Any:
    return client.completions.create(model="kimi-mini", prompt=prompt, **{"max_tokens": 8, **options})


def test_text_is_continued(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    streamed = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == answer.choices[0].text
    assert streamed[-1].usage.completion_tokens == 8
    assert complete(client, echo=True).choices[0].text == TEXT + answer.choices[0].text
    echoed = complete(client, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == TEXT + answer.choices[0].text


def test_answers_are_numbered_over_all_prompts(client: openai.OpenAI) -> None:
    prompts = [TEXT, "One two three"]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    answer = complete(client, prompts, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    counted = [complete(client, prompt).usage.prompt_tokens for prompt in prompts]
    assert answer.usage.prompt_tokens == sum(counted)


def test_prompts_of_token_ids(client: openai.OpenAI) -> None:
    assert complete(client, [5, 6, 7]).usage.prompt_tokens == 3
    assert [choice.index for choice in complete(client, [[5, 6], [7]]).choices] == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "place"), [([5, 999_999], "prompt[1]"), ([[5, 6], [7, 8, 999_999]], "prompt[1][2]")]
)
def test_a_token_outside_the_vocabulary_is_refused_with_its_place(
    client: openai.OpenAI, prompt: list[Any], place: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary") as refusal:
        complete(client, prompt)
    assert refusal.value.param == place
    assert f"`{place}`" in refusal.value.message


def test_logprobs(client: openai.OpenAI) -> None:
    (choice,) = complete(client, logprobs=2).choices
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[0] == 0


@pytest.mark.parametrize("option", [{"suffix": "x"}, {"best_of": 3}])
def test_unsupported_options_are_refused(client: openai.OpenAI, option: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported"):
        complete(client, **option)


def test_logprobs_of_prompts_are_those_of_shorter_prompts(client: openai.OpenAI, running: RunningServer) -> None:
    """The log probability of a token of the prompt is the one it has among the most likely next tokens."""
    ids = raw.post(running.port, "/tokenize", {"prompt": TEXT})["tokens"]
    texts = [TEXT, ids, [TEXT, "One two three"], [ids, [5, 6, 7]]]
    for prompt in texts:
        for choice in complete(client, prompt, echo=True, logprobs=20, max_tokens=1).choices:
            logprobs = choice.logprobs
            lengths = {len(values) for values in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs)}
            assert lengths == {len(logprobs.text_offset)}
            assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
            assert all(top[token] == value for token, value, top in _entries(logprobs)[1:])
            at = logprobs.text_offset
            assert [choice.text[start:stop] for start, stop in pairwise(at)] == logprobs.tokens[:-1]
    whole = complete(client, ids, echo=True, logprobs=20, max_tokens=1).choices[0].logprobs
    for length in range(1, len(ids)):
        step = complete(client, ids[:length], logprobs=20, max_tokens=1).choices[0].logprobs
        assert step.top_logprobs[0].keys() >= whole.top_logprobs[length].keys() - {whole.tokens[length]}
        for token, value in step.top_logprobs[0].items():
            assert value == pytest.approx(whole.top_logprobs[length].get(token, value), abs=1e-4)


def _entries(logprobs: Any) -> list[Any]:
    return list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))


@pytest.mark.parametrize("options", [{}, {"n": 2, "temperature": 0.9, "seed": 3}, {"max_tokens": 0}])
def test_streams_have_the_same_logprobs(client: openai.OpenAI, options: dict[str, Any]) -> None:
    prompts = [TEXT, "¿Qué? 👍"]
    asked = {"echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 6, **options}
    whole = complete(client, prompts, **asked)
    parts: dict[int, list[Any]] = {}
    for chunk in complete(client, prompts, stream=True, **asked):
        for choice in chunk.choices:
            parts.setdefault(choice.index, []).append(choice)
    for choice in whole.choices:
        chunks = parts[choice.index]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        assert chunks[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [value for chunk in chunks if chunk.logprobs for value in getattr(chunk.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)
    num_prompt, num_new = whole.usage.prompt_tokens, whole.usage.completion_tokens
    n = options.get("n", 1)
    assert sum(len(choice.logprobs.tokens) for choice in whole.choices) == n * num_prompt + num_new
    assert (num_new == 0) == (asked["max_tokens"] == 0)


def test_every_token_of_an_answer_has_an_entry(client: openai.OpenAI) -> None:
    """Clients cut the lists by the number of tokens, so an end token counts."""
    biased = complete(client, logprobs=1, logit_bias={"1537": 100}, max_tokens=5)
    assert biased.choices[0].finish_reason == "stop"
    assert biased.choices[0].text == ""
    assert len(biased.choices[0].logprobs.tokens) == biased.usage.completion_tokens == 1
    stopped = complete(client, logprobs=0, max_tokens=20, stop=complete(client).choices[0].text[-3:])
    assert len(stopped.choices[0].logprobs.tokens) == stopped.usage.completion_tokens
    assert all(len(top) == 1 for top in stopped.choices[0].logprobs.top_logprobs)


def test_a_minimum_length(client: openai.OpenAI) -> None:
    end = {"logit_bias": {"1537": 100, "1538": 100}}
    assert complete(client, **end).usage.completion_tokens == 1
    answer = complete(client, extra_body={"min_tokens": 5}, **end)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "stop")
    text = complete(client).choices[0].text
    assert complete(client, stop=text[:1]).choices[0].text == ""
    assert complete(client, stop=text[:1], extra_body={"min_tokens": 8}).choices[0].text == text


def test_a_penalty_changes_the_answer(client: openai.OpenAI) -> None:
    bias = {"300": 100, "301": 99.5}
    for options, count in ({}, 1), ({"extra_body": {"repetition_penalty": 2}}, 2):
        choice = complete(client, temperature=0, logprobs=0, logit_bias=bias, **options).choices[0]
        assert len(set(choice.logprobs.tokens)) == count


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_minimum_length_with_a_grammar(running: RunningServer, path: str) -> None:
    body = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 60}
    rule: dict[str, Any] = {"structured_outputs": {"regex": "[ab]+"}}
    if "chat" in path:
        rule["chat_template_kwargs"] = {"thinking": False}
    short = raw.post(running.port, path, body | rule | {"logit_bias": {"1537": 100, "1538": 100}})
    longer = raw.post(running.port, path, body | rule | {"logit_bias": {"1537": 100, "1538": 100}, "min_tokens": 20})
    assert (short["choices"][0]["finish_reason"], longer["choices"][0]["finish_reason"]) == ("stop", "stop")
    assert short["usage"]["completion_tokens"] < 20 < longer["usage"]["completion_tokens"]
    only = raw.post(running.port, path, body | rule | {"structured_outputs": {"choice": ["yes"]}, "min_tokens": 20})
    assert only["choices"][0]["finish_reason"] == "stop"  # the grammar allows nothing else
    assert only["usage"]["completion_tokens"] < 20
