"""Convert the options of a request to variables of the chat template."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from kimi_mlx.server.api_types import ChatRequest
from kimi_mlx.text.template import ChatTemplate

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Amounts of thinking, least first."""

EFFORT_VARIABLES = ("reasoning_effort", "thinking_effort")
"""Variables of templates for the amount of thinking."""


def template_variables(request: ChatRequest, template: ChatTemplate | None) -> dict[str, Any]:
    """Return the variables for a request; its `template_kwargs` take precedence over its other options.

    Templates of Kimi K2.5 and later read `thinking`, those of K2.6 and later also `preserve_thinking`. A template that
    reads an effort gets the nearest of those that it names.
    """
    variables = dict(request.template_kwargs)
    if request.thinking is not None:
        variables["thinking"] = request.thinking
    if request.keeps_reasoning:
        variables.setdefault("preserve_thinking", True)
    if request.effort is not None and template is not None:
        names, words = _effort_of(template)
        for name in names:
            variables.setdefault(name, nearest_effort(request.effort, words))
    return variables


def nearest_effort(effort: str, words: tuple[str, ...]) -> str:
    """Return the nearest of the efforts in `words`, the lower one of two; the effort itself if there are none."""
    order = EFFORTS.index
    return min(words, key=lambda word: (abs(order(word) - order(effort)), order(word)), default=effort)


@lru_cache(maxsize=8)
def _effort_of(template: ChatTemplate) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the variables in which a template expects an effort, and the efforts that its text names."""
    names = tuple(name for name in EFFORT_VARIABLES if name in template.variables())
    literals = {match for source in template.sources for match in re.findall(r"""['"]([a-z]+)['"]""", source)}
    return names, tuple(word for word in EFFORTS if word in literals)
