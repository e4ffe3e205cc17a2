"""Options of thinking, which mean the same in every API."""

from __future__ import annotations

from typing import Any, Literal

from kimi_mlx.server.http.body import Body

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""Amount of thinking, least first. The first two turn it off, the others on."""

OFF: tuple[Effort, ...] = ("none", "minimal")


class ThinkingOptions(Body):
    """Moonshot's and Anthropic's options of thinking; `budget_tokens` and `display` have no effect."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"] | None = None
    keep: Literal["all"] | None = None
    effort: Effort | None = None

    @property
    def is_on(self) -> bool:
        """Whether the model thinks. `type` takes precedence over `effort`; without either it does."""
        return self.effort not in OFF if self.type is None else self.type != "disabled"


def thinking_fields(
    options: ThinkingOptions | None,
    effort: Effort | None = None,
    switch: bool | None = None,
    default: bool | None = None,
    keeps_all: bool = False,
) -> dict[str, Any]:
    """Return the fields of a ChatRequest about thinking.

    Args:
        options: options of the API. They take precedence over `switch`, and that over `effort`.
        effort: effort from another field, if `options` has none.
        switch: another switch that turns thinking on or off.
        default: whether the model thinks if no option is given; None leaves it to the chat template.
        keeps_all: True to keep the reasoning of all earlier answers in the prompt, as `keep: all` of the options does.
    """
    effort = (options and options.effort) or effort
    is_on = default
    if options is not None and (options.type is not None or switch is None):
        is_on = options.is_on
    elif switch is not None:
        is_on = switch
    elif effort is not None:
        is_on = effort not in OFF
    keeps_all = keeps_all or (options is not None and options.keep == "all")
    return {"thinking": is_on, "effort": effort, "keeps_reasoning": keeps_all}
