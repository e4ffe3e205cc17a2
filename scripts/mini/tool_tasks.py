"""Tools that dialogues declare, requests that need them, and answers made from their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from scripts.mini.words import CITIES, COPY_WORDS, NAMES, THINGS, invented_word

Tool = dict[str, Any]
Value = str | int
Source = Callable[[Random], Value]
INVENTED_SHARE = 0.35  # share of made-up tools, and of made-up words in their arguments


def source(text: str) -> Source:
    """Return a generator of the values that `tools.json` names: `city`, `number 1 9`, `one_of on off`, ..."""
    kind, *arguments = text.split()
    if kind == "number":
        low, high = int(arguments[0]), int(arguments[1])
        return lambda rng: rng.randint(low, high)
    if kind == "one_of":
        return lambda rng: rng.choice(arguments)
    return SOURCES[kind]


def _time(rng: Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 15, 30, 45)):02d}"


def _known_or_invented(rng: Random, known: tuple[str, ...]) -> str:
    return invented_word(rng) if rng.random() < INVENTED_SHARE else rng.choice(known)


def _words(rng: Random) -> str:
    return " ".join(rng.choice(COPY_WORDS) for _ in range(rng.randint(1, 3)))


SOURCES: dict[str, Source] = {
    "city": lambda rng: _known_or_invented(rng, CITIES).title(),
    "name": lambda rng: _known_or_invented(rng, NAMES).title(),
    "thing": lambda rng: _known_or_invented(rng, THINGS),
    "word": lambda rng: _known_or_invented(rng, COPY_WORDS),
    "words": _words,
    "time": _time,
    "path": lambda rng: f"{rng.choice(COPY_WORDS)}.{rng.choice(('txt', 'md', 'py', 'json'))}",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a tool."""

    name: str
    type: str
    description: str
    values: str


@dataclass(frozen=True)
class Skill:
    """A kind of tool: names and descriptions, parameters, requests with {parameter}, results."""

    names: list[str]
    descriptions: list[str]
    parameters: list[Parameter]
    requests: list[str]
    results: dict[str, str]


_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("tools.json").read_text(encoding="utf-8"))
SKILLS = [
    Skill(**{**skill, "parameters": [Parameter(**parameter) for parameter in skill["parameters"]]})
    for skill in _DATA["skills"]
]
VERBS: list[str] = _DATA["verbs"].split()
FIELDS = [Parameter(**field) for field in _DATA["fields"]]


def invented_skill(rng: Random) -> Skill:
    """Make up a tool, which users request by its name and its fields."""
    name = f"{rng.choice(VERBS)}_{rng.choice(COPY_WORDS)}"
    fields = sorted(rng.sample(FIELDS, rng.randint(1, 2)), key=lambda field: field.name)
    listing = " and ".join(f"{field.name} {{{field.name}}}" for field in fields)
    requests = [
        f"Call {name} with {listing}.",
        f"Use {name}: {listing}",
        f"Run {name} with {listing}",
        f"Please use {name} with {listing}.",
    ]
    results = {field.name: field.values for field in rng.sample(FIELDS, rng.randint(1, 2))}
    return Skill([name], [f"{name.replace('_', ' ').capitalize()}.", ""], fields, requests, results)


def declaration(skill: Skill, name: str, rng: Random) -> Tool:
    """Return the tool in OpenAI's format. Required parameters only; some descriptions are left out."""
    described = rng.random() < 0.6
    properties = {
        field.name: {"type": field.type, **({"description": field.description} if described else {})}
        for field in skill.parameters
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": [field.name for field in skill.parameters],
    }
    description = rng.choice(skill.descriptions)
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


@dataclass(frozen=True)
class ToolCase:
    """A request for one of the declared tools, with its call, result and answer."""

    request: str
    name: str
    arguments: str
    result: str
    answer: str


class Toolbox:
    """The tools that one dialogue declares."""

    def __init__(self, rng: Random, most: int):
        skills = rng.sample(SKILLS, rng.randint(1, most))
        self._skills = [invented_skill(rng) if rng.random() < INVENTED_SHARE else skill for skill in skills]
        self._names = [rng.choice(skill.names) for skill in self._skills]
        self.tools = [declaration(skill, name, rng) for skill, name in zip(self._skills, self._names, strict=True)]

    def case(self, rng: Random) -> ToolCase:
        """Make up a request for any of the tools."""
        wanted = rng.randrange(len(self._skills))
        skill, name = self._skills[wanted], self._names[wanted]
        values = {field.name: source(field.values)(rng) for field in skill.parameters}
        request = rng.choice(skill.requests).format(**values)
        if rng.random() < 0.1:
            request = f"Use {name}. {request}"
        outcome = {field: source(values)(rng) for field, values in skill.results.items()}
        answer = ", ".join(f"{field}: {value}" for field, value in outcome.items())
        arguments, result = json.dumps(values, ensure_ascii=False), json.dumps(outcome, ensure_ascii=False)
        return ToolCase(request, name, arguments, result, f"The tool says {answer}.")
