"""Settings of a conversation: /set, /system, /thinking, and what /model, /plan and /stats show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cli.chat.answer_settings import SETTINGS, AnswerSettings, complete_setting, kept_sources, parse_setting
from kimi_mlx.cli.chat.commands.commands import ELSEWHERE
from kimi_mlx.cli.chat.commands.status_commands import describe_model, describe_plan
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl import Repl
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.cli.model_size import model_shape
from kimi_mlx.cli.output import stderr
from kimi_mlx.engine.request import SAMPLING_RANGES, Sampling
from kimi_mlx.errors import UsageError
from kimi_mlx.planner.choice import Choice, memory_of
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.session.chat_model import ChatOptions
from kimi_mlx.session.model_status import ModelStatus, RankStatus
from tests.fakes import conversation_of


class Chat:
    """A conversation in which commands are typed."""

    def __init__(self, capfd: pytest.CaptureFixture[str], options: ChatOptions | None = None, **sources: str):
        conversation = conversation_of("yes")
        conversation.options = options or ChatOptions()
        self.state = ReplState(conversation, sources)
        self._repl, self._capfd = Repl(self.state), capfd

    def type(self, line: str) -> str:
        self._repl.handle(UserInput(line))
        return self._capfd.readouterr().err

    @property
    def options(self) -> ChatOptions:
        return self.state.conversation.options


@pytest.fixture
def chat(capfd: pytest.CaptureFixture[str]) -> Chat:
    return Chat(
        capfd, ChatOptions(sampling={"temperature": 0.2, "top_k": 5}), temperature="config.toml", top_k="option"
    )


def rows(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()}


def test_settings_are_listed_with_their_sources(chat: Chat) -> None:
    listed = rows(chat.type("/set"))
    assert list(listed) == list(SETTINGS)
    assert listed["temperature"] == ["0.2", "config.toml"]
    assert listed["top_k"] == ["5", "option"]
    assert listed["top_p"] == ["1", "(off)", "model"]
    assert listed["seed"] == ["random", "default"]
    assert listed["max_tokens"] == ["512", "model"]  # kimi-mini's own limit


def test_a_setting_is_changed_for_the_next_answers_and_taken_back(chat: Chat) -> None:
    assert rows(chat.type("/set temperature 0.6")) == {"temperature": ["0.6", "/set"]}
    assert rows(chat.type("/set max_tokens=3"))["max_tokens"] == ["3", "/set"]
    chat.type("/set seed 7")
    chat.type("hi")
    request = chat.state.conversation.model._session.requests[-1]  # pyright: ignore
    assert (request.sampling, request.max_tokens) == (Sampling(0.6, top_k=5, seed=7), 3)
    assert rows(chat.type("/set temperature default"))["temperature"] == ["0.2", "config.toml"]
    assert rows(chat.type("/set seed default"))["seed"] == ["random", "default"]
    chat.type("/set max_tokens default")
    assert chat.options == ChatOptions(sampling={"temperature": 0.2, "top_k": 5})
    assert rows(chat.type("/set top_k")) == {"top_k": ["5", "option"]}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("temperature 3", "temperature is a number from 0 to 2, not `3`"),
        ("temperature hot", "not `hot`"),
        ("temperature -1", "not `-1`"),
        ("temperature nan", "not `nan`"),
        ("top_p 0", "top_p is a number above 0, up to 1, not `0`"),
        ("top_k 1.5", "top_k is a whole number from 0 to 2147483648"),
        ("presence_penalty -3", "presence_penalty is a number from -2 to 2, not `-3`"),
        ("max_tokens 0", "max_tokens is a whole number from 1 up"),
        ("seed 99999999999999999999999", "seed is a whole number"),
        ("temp 1", "did you mean `temperature`?"),
        ("top-p 1", "did you mean `top_p`?"),
        ("tokens 1", "did you mean `max_tokens`?"),
        ("system Be brief", "type `/system`"),
        ("parameter temperature 1", "there are temperature, top_p"),
        ("x", "there is no setting `x`"),
    ],
)
def test_a_wrong_setting_changes_nothing(chat: Chat, typed: str, message: str) -> None:
    before = chat.options
    assert message in chat.type(f"/set {typed}")
    assert chat.options == before


@given(st.sampled_from(SETTINGS), st.one_of(st.integers(-5, 5), st.floats(-3, 3)))
def test_a_setting_that_is_accepted_is_one_that_requests_accept(name: str, number: float) -> None:
    try:
        value = parse_setting(name, repr(number))
    except UsageError:
        return
    assert value == number
    if name in SAMPLING_RANGES:
        Sampling(**{name: value})  # pyright: ignore[reportArgumentType]


def test_a_server_that_does_not_say_its_values() -> None:
    class Silent:
        def recommended_sampling(self, options: ChatOptions) -> dict[str, float]:
            return {}

    values = AnswerSettings(ChatOptions()).values(ChatOptions(), Silent())  # pyright: ignore[reportArgumentType]
    assert {item.name: item.source for item in values}["temperature"] == "server"


def test_completion_of_settings() -> None:
    assert complete_setting("te") == SETTINGS
    assert complete_setting("temperature ") == ("default",)


def test_the_system_prompt_is_set_from_text_and_file_and_keeps_the_messages(chat: Chat, tmp_path: Path) -> None:
    chat.type("hi")
    assert "the 2 messages so far stay" in chat.type("/system Be brief. \n And kind. ")
    conversation = chat.state.conversation
    assert conversation.system == "Be brief. \n And kind."
    file = tmp_path / "a prompt.txt"
    file.write_text("From a file.\n")
    assert "system prompt set" in chat.type(f"/system @{file}")
    assert conversation.system == "From a file."
    assert "the same as before" in chat.type(f"/system @{file}")
    assert "From a file." in chat.type("/system")
    file.write_text(" \n")
    assert "is empty" in chat.type(f"/system @{file}")
    assert "there is no file" in chat.type("/system @/nowhere")
    assert conversation.system == "From a file."
    assert "removed" in chat.type("/system -")
    assert conversation.system is None
    assert "there is no system prompt" in chat.type("/system")
    assert len(conversation.messages) == 2


def test_thinking_is_switched_and_displayed(chat: Chat) -> None:
    assert "thinking as the model does by default · display: fold" in chat.type("/thinking")
    assert "thinking off" in chat.type("/thinking off")
    assert chat.options.thinking is False
    assert "display: hide" in chat.type("/thinking hide")
    assert chat.state.reasoning == "hide"
    chat.type("/thinking default")
    assert chat.options.template_kwargs == {}
    assert "type one of on, off" in chat.type("/thinking maybe")


def test_a_model_that_cannot_switch_its_thinking_says_so(chat: Chat) -> None:
    model = chat.state.conversation.model
    tokenizer = model._tokenizer  # pyright: ignore
    model._tokenizer = replace(tokenizer, template=type(tokenizer.template)("{{ messages }}"))  # pyright: ignore
    assert "`fake` cannot switch its thinking" in chat.type("/thinking off")
    assert chat.options.thinking is None


def shown(renderable: object, width: int = 80) -> str:
    with stderr.capture() as capture:
        stderr.print(renderable, soft_wrap=False, width=width)
    return capture.get()


STATUS = ModelStatus(
    *("kimi-k2", 131072, "hybrid", "ring", "hybrid on 2 ranks: mac-a, mac-b"),
    ranks=[
        RankStatus(0, "mac-a", "heads 0-31 of 64, 50% of each expert", weights_bytes=289 * 10**9, free_bytes=10**11),
        RankStatus(1, "mac-b", "heads 32-63 of 64, 50% of each expert", weights_bytes=289 * 10**9),
    ],
    cached_tokens=3000,
)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_status_of_a_model_fits_the_terminal(width: int) -> None:
    output = shown(describe_model(STATUS, 1234, width), width)
    assert max(len(line.rstrip()) for line in output.splitlines()) <= width
    assert "1,234 of 131,072 tokens" in " ".join(output.split())
    assert output.count("269.2 GiB") == 2
    assert "mac-b" in output


def test_little_is_shown_of_a_server_that_says_little() -> None:
    output = shown(describe_model(ModelStatus("gpt", url="http://a\x1b[31m"), 12, 80))
    assert output.split() == ["model", "gpt", "server", *output.split()[3:4], "context", "12", "tokens"]
    assert "\x1b" not in output


def test_the_plan_shows_reason_and_memory() -> None:
    memory = memory_of("hybrid", model_shape("kimi-k2"), parse_machines("m3-ultra-512x2"))
    choice = Choice("hybrid", "RDMA at 0.005 ms per message: 20.0 tok/s predicted", memory)
    output = shown(describe_plan(choice, None, 80))
    assert "hybrid: RDMA" in output
    assert output.count("m3-ultra-512") == 2
    assert "needed" in output


def test_the_commands_of_status(chat: Chat) -> None:
    assert "fake" in chat.type("/model")
    assert "the server has placed the model" in chat.type("/plan")
    chat.state.placement = Choice("", "served at http://mac-a:8080")
    assert "the server has placed the model" in chat.type("/plan")
    chat.state.placement = Choice("hybrid", "one rank has the whole model")
    plan = chat.type("/plan")
    assert "hybrid: one rank has the whole model" in plan
    assert "no prediction" in plan  # the planner does not know this model
    chat.type("hi")
    assert "last answer: " in chat.type("/stats")


def test_settings_of_a_continued_conversation_have_no_other_source() -> None:
    sources = {"temperature": "config.toml", "seed": "option", "model": "option"}
    given = ChatOptions(sampling={"temperature": 0.5, "seed": 1})
    now = ChatOptions(sampling={"temperature": 0.2, "seed": 1, "top_p": 0.9}, max_tokens=5)
    kept = kept_sources(sources, given, now)
    assert kept == {"seed": "option", "model": "option"}
    values = AnswerSettings(now, kept).values(now, conversation_of("yes").model)
    assert {item.name: item.source for item in values} == {
        "temperature": "this conversation",
        "top_p": "this conversation",
        "top_k": "model",
        "min_p": "model",
        "frequency_penalty": "model",
        "presence_penalty": "model",
        "repetition_penalty": "model",
        "seed": "option",
        "max_tokens": "this conversation",
    }


def test_words_of_other_tools_are_answered_with_ours(chat: Chat) -> None:
    assert "try `/thinking` or `/title`" in chat.type("/thi")
    assert "display: fold" in chat.type("/Thinking")
    assert "there is no command `/Thi`" in chat.type("/Thi")
    for word, ours in ELSEWHERE.items():
        assert f"try `{ours}`" in chat.type(word)
        assert ours.split()[0] in Repl(chat.state).command_list
        assert word not in Repl(chat.state).command_list


def test_names_of_commands_are_unique(chat: Chat) -> None:
    names = [name for command in Repl(chat.state).command_list for name in (command.name, *command.other_names)]
    assert len(set(names)) == len(names)


def test_the_context_in_use_follows_the_messages(chat: Chat) -> None:
    chat.type("hi")
    used = chat.state.status.used
    chat.type("a much longer message " * 20)
    assert chat.state.status.used > used + 20 > 20
    chat.type("/undo")
    assert 0 < chat.state.status.used < used + 20
    chat.type("/clear")
    assert chat.state.status.used == 0
    assert ReplState(chat.state.conversation).status.used == 0


def test_another_conversation_brings_its_settings(chat: Chat) -> None:
    chat.type("/set seed 7")
    conversation = chat.state.conversation
    conversation.options = ChatOptions(sampling={"temperature": 0.2, "seed": 7, "top_p": 0.5})
    chat.state.restart()
    listed = rows(chat.type("/set"))
    assert listed["temperature"] == ["0.2", "config.toml"]
    assert listed["seed"] == ["7", "this", "conversation"]
    assert listed["top_p"] == ["0.5", "this", "conversation"]
    assert listed["top_k"] == ["0", "(off)", "model"]


def test_an_argument_that_a_command_does_not_take_is_refused(chat: Chat) -> None:
    chat.type("hi")
    assert "`/clear` takes no argument" in chat.type("/clear all")
    assert "type `/clear` alone" in chat.type("/reset everything")
    assert len(chat.state.conversation.messages) == 2
    assert "kimi-mlx chat MODEL --continue" in chat.type("/model kimi-k2")
