"""Plain completions with the `openai` package."""

from __future__ import annotations

from typing import Any

import openai
import pytest

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


@pytest.mark.parametrize("option", [{"suffix": "x"}, {"best_of": 3}, {"echo": True, "logprobs": 1}])
def test_unsupported_options_are_refused(client: openai.OpenAI, option: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported"):
        complete(client, **option)
