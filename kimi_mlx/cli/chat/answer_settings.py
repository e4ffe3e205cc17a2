"""Settings of the answers of a conversation: their values, where these come from, and changes to them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kimi_mlx.engine.request import SAMPLING_RANGES, WHOLE_NUMBERS
from kimi_mlx.errors import UsageError
from kimi_mlx.session.chat_model import ChatModel, ChatOptions

MAX_TOKENS = "max_tokens"
SETTINGS = (*SAMPLING_RANGES, MAX_TOKENS)
"""Names of the settings, as in OpenAI's API."""

DEFAULT = "default"
"""Value that takes a change back."""

CHANGED = "/set"
"""Source of a value that was set in the conversation."""

CONTINUED = "this conversation"
"""Source of a value that a continued conversation had."""

UNSET = {"seed": "random", MAX_TOKENS: "the rest of the context"}
"""Values of settings that nothing sets, for people."""

NO_EFFECT = {
    ("top_p", 1),
    ("top_k", 0),
    ("min_p", 0),
    ("frequency_penalty", 0),
    ("presence_penalty", 0),
    ("repetition_penalty", 1),
}
"""Values of settings that change nothing, by name."""

COMMAND_OF = {"system": "/system", "thinking": "/thinking", "think": "/thinking", "model": "/model"}
"""Commands for settings that `/set` does not have."""


@dataclass(frozen=True)
class SettingValue:
    """A setting as it is shown.

    Args:
        name: name of the setting.
        value: its value for people.
        source: where the value comes from: `/set`, an option, a file, or the model.
    """

    name: str
    value: str
    source: str


class AnswerSettings:
    """The settings of a conversation.

    Args:
        start: options that the conversation began with.
        sources: where the settings in `start` come from, by name.
    """

    def __init__(self, start: ChatOptions, sources: Mapping[str, str] | None = None):
        self._start = start
        self._sources = sources or {}
        self._changed: set[str] = set()

    def restart(self, options: ChatOptions) -> None:
        """Begin again with the options of another conversation; those that are as before keep their source."""
        self._sources = kept_sources(self._sources, self._start, options)
        self._start = options
        self._changed.clear()

    def values(self, options: ChatOptions, model: ChatModel) -> list[SettingValue]:
        """Return all settings.

        Args:
            options: current options of the answers.
            model: model whose recommendations apply where the options set nothing.
        """
        chosen, recommended = _settings_of(options), model.recommended_sampling(options)
        return [self._value(name, chosen, recommended) for name in SETTINGS]

    def change(self, options: ChatOptions, name: str, text: str) -> ChatOptions:
        """Return options with one setting changed.

        Args:
            options: current options of the answers.
            name: name of the setting; see check_setting().
            text: its value as typed; `default` for the value that the conversation began with.

        Raises:
            UsageError: the value is out of its range.
        """
        if text == DEFAULT:
            self._changed.discard(name)
            value = _settings_of(self._start).get(name)
        else:
            value = parse_setting(name, text)
            self._changed.add(name)
        if name == MAX_TOKENS:
            return replace(options, max_tokens=value)
        sampling = {key: kept for key, kept in options.sampling.items() if key != name}
        return replace(options, sampling=sampling if value is None else {**sampling, name: value})

    def _value(
        self, name: str, chosen: Mapping[str, float | int], recommended: Mapping[str, float | int]
    ) -> SettingValue:
        if name in chosen:
            source = CHANGED if name in self._changed else self._sources.get(name, CONTINUED)
            return SettingValue(name, _format(name, chosen[name]), source)
        if name in recommended:
            return SettingValue(name, _format(name, recommended[name]), "model")
        return SettingValue(name, UNSET.get(name, "the server's"), "default" if name in UNSET else "server")


def check_setting(name: str) -> None:
    """Check the name of a setting.

    Raises:
        UsageError: there is no such setting; the hint has a similar one.
    """
    if name not in SETTINGS:
        raise UsageError(f"there is no setting `{name:.40}`", hint=_suggestion(name))


def parse_setting(name: str, text: str) -> float | int:
    """Return the value of a setting.

    Args:
        name: name of the setting.
        text: value as typed.

    Raises:
        UsageError: it is not a number, or out of the range of the setting.
    """
    is_whole = name in WHOLE_NUMBERS or name == MAX_TOKENS
    low, high = SAMPLING_RANGES.get(name, (1, None))
    kind = "a whole number" if is_whole else "a number"
    above = name == "top_p"  # 0 would leave no token
    limits = f"above 0, up to {high}" if above else f"from {low} up" if high is None else f"from {low} to {high}"
    pattern = r"\d+" if is_whole else r"-?(\d*\.?\d+(e[+-]?\d+)?|\d+\.)"
    if re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
        value = int(text[:30]) if is_whole else float(text)
        if (value > low if above else value >= low) and (high is None or value <= high):
            return value
    raise UsageError(f"{name} is {kind} {limits}, not `{text:.40}`", hint=f"`/set {name} {DEFAULT}` takes it back")


def kept_sources(sources: Mapping[str, str], given: ChatOptions, now: ChatOptions) -> dict[str, str]:
    """Return the sources of the settings that are still what the user gave, and not those of a continued conversation.

    Args:
        sources: where the options that the user gave come from, by name.
        given: options that the user gave.
        now: options with the settings of the conversation.
    """
    before, after = _settings_of(given), _settings_of(now)
    return {name: source for name, source in sources.items() if before.get(name) == after.get(name)}


def _settings_of(options: ChatOptions) -> dict[str, float | int]:
    """Return the settings that options set."""
    limit = {} if options.max_tokens is None else {MAX_TOKENS: options.max_tokens}
    return {**options.sampling, **limit}


def _format(name: str, value: float | int) -> str:
    if name == "temperature" and value == 0:
        return "0 (greedy)"
    if (name, value) in NO_EFFECT:
        return f"{value:g} (off)"
    return f"{value:,}" if name == MAX_TOKENS else f"{value}"


def _suggestion(name: str) -> str:
    """Return a hint for a name that is not that of a setting."""
    lower = name.lower()
    if lower in COMMAND_OF:
        return f"type `{COMMAND_OF[lower]}`"
    near = difflib.get_close_matches(lower.replace("-", "_"), SETTINGS, n=1, cutoff=0.5)
    near += [setting for setting in SETTINGS if len(lower) > 1 and setting.startswith(lower)]
    return f"did you mean `{near[0]}`?" if near else f"there are {', '.join(SETTINGS)}"


def complete_setting(argument: str) -> Sequence[str]:
    """Return what the last word of `/set` may be completed to."""
    return (DEFAULT,) if " " in argument.lstrip() else SETTINGS
