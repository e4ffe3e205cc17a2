"""Render messages and tools as a prompt with the chat template of a checkpoint, as text or as token ids.

A template is an untrusted program. It runs in jinja2's sandbox, without files or network, and with a limited number of
loop steps. Only the template can write control tokens: text in messages, tools and options stays text.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kimi_mlx.errors import TextError
from kimi_mlx.text.control_tokens import ControlTokens, choose_escape, json_escape, strings_in
from kimi_mlx.text.messages import Message
from kimi_mlx.text.tokenizer import Tokenizer, read_json
from kimi_mlx.text.tool_declarations import ToolDeclarationError, to_typescript

TEMPLATE_FILE = "chat_template.jinja"
MAX_LOOP_STEPS = 1_000_000
MAX_PRODUCT = 10_000_000
HINT = "the chat template comes with the checkpoint; use one for Kimi K2 to K2.7"


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: text of the template.
        name: name of its file, for error messages.

    Raises:
        TextError: the source is not a jinja2 template.
    """

    def __init__(self, source: str, name: str = TEMPLATE_FILE):
        self.source = source
        self._name = name
        # From K2-Thinking on, tools reach the template with their keys sorted.
        self._sorts_tools = "<think>" in source
        environment = _Environment()
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TextError(f"`{name}` line {error.lineno}: {error.message}", hint=HINT) from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Read `chat_template.jinja` of a checkpoint, or the template in its `tokenizer_config.json`.

        Raises:
            TextError: the checkpoint has no template, or it is broken.
        """
        template = cls.find(folder)
        if template is None:
            raise TextError(f"`{folder}` has no chat template", hint=f"add a `{TEMPLATE_FILE}` to it")
        return template

    @classmethod
    def find(cls, folder: Path) -> ChatTemplate | None:
        """Read the template as `load` does; return None if the checkpoint has none.

        Raises:
            TextError: the template is broken.
        """
        path = Path(folder) / TEMPLATE_FILE
        if path.exists():
            try:
                return cls(path.read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise TextError(f"cannot read `{path}`: {error}") from error
        path = Path(folder) / "tokenizer_config.json"
        source = _default_template(read_json(path).get("chat_template"))
        return None if source is None else cls(source, str(path))

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """Return the prompt as text. Control tokens of the template look the same as such text of users.

        Args:
            messages: conversation, as messages or as dictionaries in OpenAI's format.
            tools: OpenAI-style tools.
            add_generation_prompt: True to end with the beginning of the assistant's turn.
            template_kwargs: further variables of the template, such as `thinking` and `preserve_thinking`.

        Raises:
            TextError: a message is invalid, or the template fails.
        """
        return self._run(self._variables(messages, tools, add_generation_prompt, template_kwargs))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """Return the prompt as token ids; arguments and errors as for `render`."""
        variables = self._variables(messages, tools, add_generation_prompt, template_kwargs)
        control_tokens = ControlTokens(tokenizer.special_tokens)
        try:
            escape = choose_escape([self.source, *strings_in(variables)])
            variables = control_tokens.escape_in(variables, escape)
        except RecursionError as error:
            raise TextError("messages or tools are nested too deeply") from error
        prompt = self._run(variables)
        ids: list[int] = []
        for part in control_tokens.split(prompt):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += tokenizer.encode(part.replace(escape, "").replace(json_escape(escape), ""))
        return ids

    def _variables(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return all variables of the template."""
        parsed = [m if isinstance(m, Message) else Message.from_dict(m) for m in messages]
        try:
            # A round trip through JSON leaves plain values only, with limited nesting.
            plain_tools = json.loads(json.dumps(list(tools or ()), sort_keys=self._sorts_tools))
            options = json.loads(json.dumps(dict(template_kwargs)))
        except (TypeError, ValueError, RecursionError) as error:
            raise TextError(f"tools and template options must be plain JSON values: {error}") from error
        try:
            declarations = to_typescript(plain_tools) or None
        except ToolDeclarationError:
            declarations = None
        return {
            **options,
            "messages": [message.to_dict() for message in parsed],
            "tools": plain_tools or None,
            "tools_ts_str": declarations,
            "add_generation_prompt": add_generation_prompt,
        }

    def _run(self, variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render(variables, range=_LoopBudget())
        except Exception as error:  # a template may fail in any way
            where = _template_line(error)
            at = f" line {where}" if where else ""
            raise TextError(f"`{self._name}`{at}: {error or type(error).__name__}", hint=HINT) from error


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the functions and settings that published chat templates need."""

    intercepted_binops = frozenset(["*", "**"])
    filters: dict[str, Any]

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.globals = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"namespace": jinja2.utils.Namespace, "dict": dict}

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse powers, and products that would exhaust the memory."""
        if operator == "**" or _product_size(left, right) > MAX_PRODUCT:
            raise OverflowError(f"`{operator}` makes a value that is too large")
        return super().call_binop(context, operator, left, right)


class _LoopBudget:
    """`range` for one run of a template. All loops together are limited to `MAX_LOOP_STEPS` steps."""

    def __init__(self) -> None:
        self._left = MAX_LOOP_STEPS

    def __call__(self, *bounds: int) -> range:
        steps = range(*bounds)
        self._left -= len(steps)
        if self._left < 0:
            raise OverflowError(f"template loops take more than {MAX_LOOP_STEPS} steps")
        return steps


def _product_size(left: Any, right: Any) -> int:
    """Return an upper bound of the elements, or bits, of a product; 0 for other types."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return len(cast("Sequence[Any]", sequence)) * count
    return 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Hugging Face's templates expect it: without HTML escapes or Unicode escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _template_line(error: Exception) -> int | None:
    """Return the line of the template that failed, from the traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None


def _default_template(value: Any) -> str | None:
    """Return the template of a tokenizer configuration: a string, or the one named `default` in a list."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in cast("list[dict[str, Any]]", value)}
        value = named.get("default")
    return value if isinstance(value, str) else None
