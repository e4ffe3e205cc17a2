"""A chat model of this process: the tokenizer builds the prompt, and a session generates the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from kimi_mlx.engine.events import Event, Finished, PromptLogprobs, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.prompt import Prompt
from kimi_mlx.session.chat_model import ChatEvent, ChatOptions
from kimi_mlx.session.model_status import ModelDeployment, ModelStatus, model_status
from kimi_mlx.session.session import Session
from kimi_mlx.text.call_ids import CallIds, to_kimi_ids
from kimi_mlx.text.media import MediaKind
from kimi_mlx.text.messages import Delta, Message
from kimi_mlx.text.output import OutputParser

if TYPE_CHECKING:
    from kimi_mlx.images.video import MediaChunk


class LocalChatModel:
    """A chat model of this process or of a ring that it has started.

    Args:
        session: loaded model; close() closes it.
        tokenizer: text side of the model.
        deployment: name and hosts of the model.
        instant_sampling: recommended sampling parameters, by name, of answers without thinking.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: ChatTokenizer,
        deployment: ModelDeployment,
        instant_sampling: Mapping[str, float] | None = None,
    ):
        self.name = deployment.name
        self._session = session
        self._tokenizer = tokenizer
        self._instant_sampling = instant_sampling or {}
        self._deployment = deployment

    @property
    def context(self) -> int:
        """Maximum number of tokens of a prompt and its answer."""
        return self._session.context

    @property
    def image_error(self) -> KimiMlxError | None:
        """Error of messages with images if the model does not see images; None if it does."""
        return self._session.image_error

    @property
    def can_switch_thinking(self) -> bool:
        """Whether the chat template has the variable `thinking`."""
        return self._tokenizer.template is not None and "thinking" in self._tokenizer.template.variables()

    def generate(self, messages: Sequence[Message], options: ChatOptions) -> Iterator[ChatEvent]:
        """Answer messages; the last event is Finished.

        Raises:
            GrammarError: a tool or the schema of the answer cannot be enforced.
            KimiMlxError: the messages cannot be rendered, or the session has failed.
        """
        prompt, ids = self._prompt(messages, options)
        special_tokens = self._tokenizer.tokenizer.special_tokens
        grammar = options.grammar(special_tokens, prompt.ids, len(ids.client_ids)).rules
        sampling = merge_sampling(self._tokenizer.sampling, self._instant_sampling, options)
        request = make_request(self._tokenizer, prompt, sampling, options.max_tokens, grammar)
        parser = self._tokenizer.output_parser(prompt.ids, options.tools)
        allocator = ids.allocator()
        for event in parse_events(self._session.generate(request), parser):
            yield allocator.assign(event) if isinstance(event, Delta) else event

    def count_tokens(self, messages: Sequence[Message], options: ChatOptions) -> int:
        """Return the number of tokens of the prompt."""
        return len(self._prompt(messages, options)[0].ids)

    def prepare_media(self, kind: MediaKind, source: str | bytes, place: str) -> Sequence[MediaChunk]:
        """Return an image as one chunk, or the chunks of a video, as the model sees them."""
        return self._tokenizer.prepare_media(kind, source, place)

    def recommended_sampling(self, options: ChatOptions) -> Mapping[str, float | int]:
        """Return the checkpoint's sampling parameters, with the catalogue's for answers without thinking."""
        unset = replace(options, sampling={})
        values = asdict(merge_sampling(self._tokenizer.sampling, self._instant_sampling, unset))
        values["max_tokens"] = self._tokenizer.max_tokens
        return {name: value for name, value in values.items() if value is not None}

    def status(self) -> ModelStatus:
        """Return what runs where."""
        return model_status(self._deployment, self._session)

    def cancel(self) -> None:
        """Cancel all answers."""
        self._session.cancel_all()

    def reset(self) -> None:
        """Drop the KV caches."""
        self._session.reset()

    def close(self) -> None:
        """Close the session."""
        self._session.close()

    def _prompt(self, messages: Sequence[Message], options: ChatOptions) -> tuple[Prompt, CallIds]:
        """Return the prompt, in which all tool calls have Kimi's ids, and the ids of the messages."""
        options.check_schemas()
        renamed, ids = to_kimi_ids(messages)
        return self._tokenizer.prompt(renamed, options.prompt_tools, **options.template_kwargs), ids


def merge_sampling(recommended: Sampling, instant: Mapping[str, float], options: ChatOptions) -> Sampling:
    """Return the sampling parameters of an answer: the user's, else those without thinking, else the recommended ones.

    Args:
        recommended: sampling that the checkpoint recommends.
        instant: recommended sampling parameters, by name, of answers without thinking.
        options: options of the answer.

    Raises:
        UsageError: a number is out of range.
    """
    without_thinking = instant if options.thinking is False else {}
    return replace(recommended, **{**without_thinking, **options.sampling})


def make_request(
    tokenizer: ChatTokenizer,
    prompt: Prompt,
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    grammar: str | None = None,
) -> Request:
    """Return the engine's request for a prompt.

    Args:
        tokenizer: tokenizer, with the defaults of the checkpoint.
        prompt: prompt.
        sampling: sampling parameters; None for the checkpoint's.
        max_tokens: maximum number of new tokens; None for the checkpoint's limit.
        grammar: grammar of the answer; None for no constraint.
    """
    return Request(
        prompt=tuple(prompt.ids),
        max_tokens=tokenizer.max_tokens if max_tokens is None else max_tokens,
        sampling=sampling or tokenizer.sampling,
        stop_ids=tokenizer.stop_ids,
        grammar=grammar,
        images=prompt.images,
    )


def parse_events(events: Iterator[Event], parser: OutputParser) -> Iterator[ChatEvent]:
    """Convert tokens to deltas; drop log probabilities of the prompt. All other events pass through."""
    for event in events:
        if isinstance(event, Token):
            delta = parser.add(event.id)
        elif isinstance(event, Finished):
            delta = parser.finish()
        else:
            delta = Delta()
        if delta:
            yield delta
        if not isinstance(event, Token | PromptLogprobs):
            yield event
