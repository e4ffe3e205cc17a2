"""Render messages and tools as a prompt with the chat template of a checkpoint, as text or as token ids.

A template is an untrusted program. It runs in a sandbox without files or network, and with limited time and memory
(`template_sandbox`). Only the template can write control tokens: text in messages, tools and options stays text.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jinja2

from kimi_mlx.errors import TextError
from kimi_mlx.files import read_regular_file
from kimi_mlx.text.control_tokens import ControlTokens, choose_escape, json_escape, strings_in
from kimi_mlx.text.media import VIDEO_PLACEHOLDER
from kimi_mlx.text.messages import Message
from kimi_mlx.text.template_sandbox import BoundedEnvironment
from kimi_mlx.text.tokenizer import TOKENIZER_FILES, Tokenizer, read_json
from kimi_mlx.text.tool_declarations import ToolDeclarationError, to_typescript

TEMPLATE_FILE = "chat_template.jinja"
LEGACY_TEMPLATE_FILE = "chat_template.json"
EXTRA_TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT_NAME = "default"
TOOL_NAME = "tool_use"
MARKER = re.compile(r"<\|[^|<>{}\s]+\|>")
VIDEO_ID = -1
"""Id of the placeholder of a video, which is not a token, among the ids of control tokens."""
TEMPLATE_HINT = "the chat template comes with the checkpoint; use one for Kimi K2 to K2.7"


class ChatTemplate:
    """The chat template of a checkpoint, or its two templates: one for conversations with tools, one for all others.

    Args:
        source: text of the template.
        name: name of its file, for error messages.
        tool_source: text of the template for conversations with tools; None to use `source` for them too.

    Raises:
        TextError: a source is not a jinja2 template.
    """

    def __init__(self, source: str, name: str = TEMPLATE_FILE, tool_source: str | None = None):
        self.sources = (source, source if tool_source is None else tool_source)
        self._name = name
        self._environment = BoundedEnvironment()
        self._template = self._compile(source)
        self._tool_template = self._template if tool_source is None else self._compile(tool_source)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Read the template of a checkpoint.

        Raises:
            TextError: the checkpoint has no template, or it is broken.
        """
        template = cls.find(folder)
        if template is None:
            raise TextError(f"`{folder}` has no chat template", hint=f"add a `{TEMPLATE_FILE}` to it")
        return template

    @classmethod
    def find(cls, folder: Path) -> ChatTemplate | None:
        """Read the template of a checkpoint, from the files that transformers reads; None if there is none.

        They are, best first: `chat_template.jinja` with `additional_chat_templates/*.jinja`, `chat_template.json`, and
        `chat_template` in `tokenizer_config.json`, one template or a list of named ones. Of several, `tool_use` is used
        for conversations with tools, `default` for all others.

        Raises:
            TextError: the template is broken.

        Source: `PreTrainedTokenizerBase.get_chat_template` and `ProcessorMixin` of transformers.
        """
        folder = Path(folder)
        named: dict[str, str] = {}
        path = folder / "tokenizer_config.json"
        for file in (path, folder / LEGACY_TEMPLATE_FILE):
            if templates := _named_templates(file):
                named, path = templates, file
        extra = {file.stem: file for file in sorted((folder / EXTRA_TEMPLATE_FOLDER).glob("*.jinja"))}
        if (folder / TEMPLATE_FILE).exists():
            named, path = {}, folder / TEMPLATE_FILE
            extra[DEFAULT_NAME] = path
        named |= {name: _read_text(file) for name, file in extra.items()}
        default, with_tools = named.get(DEFAULT_NAME), named.get(TOOL_NAME)
        if default is None:
            default, with_tools = with_tools, None
        return None if default is None else cls(default, str(path), with_tools)

    def markers(self) -> frozenset[str]:
        """Return the markers such as `<|im_end|>` that the templates write and a tokenizer must have as tokens."""
        texts = "\n".join(text for source in self.sources for text in self._environment.texts_of(source))
        return frozenset(MARKER.findall(texts)) - {VIDEO_PLACEHOLDER}

    def variables(self) -> frozenset[str]:
        """Return the names of the variables that the templates read, such as `messages` and `thinking`."""
        return frozenset(name for source in self.sources for name in self._environment.variables_of(source))

    def check_markers(self, special_tokens: Iterable[str], folder: Path) -> None:
        """Check that each marker of the template is a special token. Otherwise the model would read it as plain text.

        Args:
            special_tokens: texts of the tokenizer's special tokens.
            folder: folder of the checkpoint, for error messages.

        Raises:
            TextError: a marker is not a special token.
        """
        missing = sorted(self.markers() - set(special_tokens))
        if missing:
            names = ", ".join(f"`{name}`" for name in missing[:3])
            others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise TextError(
                f"the chat template of `{folder}` uses {names}{others}, which its tokenizer does not have as special"
                f" tokens (missing {len(missing)} of {len(self.markers())})",
                hint="special tokens are listed in `tokenizer_config.json` (`added_tokens_decoder`) or `tokenizer.json`"
                " (`added_tokens`); take both files from the checkpoint's original repository",
            )

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
        """Return the prompt as token ids; arguments and errors as for `render`. The messages must be text only."""
        ids: list[int] = []
        for part in self.render_parts(tokenizer, messages, tools, add_generation_prompt, **template_kwargs):
            ids += [part] if isinstance(part, int) else tokenizer.encode(part)
        return ids

    def render_parts(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[str | int]:
        """Return the prompt as plain texts and ids of control tokens, in order; arguments and errors as for `render`.

        A control token in a text is text of a user. The placeholder of a video is `VIDEO_ID`.
        """
        variables = self._variables(messages, tools, add_generation_prompt, template_kwargs)
        control_tokens = ControlTokens({**tokenizer.special_tokens, VIDEO_PLACEHOLDER: VIDEO_ID})
        try:
            escape = choose_escape([*self.sources, *strings_in(variables)])
            variables = control_tokens.escape_in(variables, escape)
        except RecursionError as error:
            raise TextError("messages or tools are nested too deeply") from error
        escape_in_json = json_escape(escape)
        return [
            part if isinstance(part, int) else part.replace(escape, "").replace(escape_in_json, "")
            for part in control_tokens.split(self._run(variables))
        ]

    def _variables(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return all variables of the template."""
        # From K2-Thinking on, tools reach the template with their keys sorted.
        sorts_tools = "<think>" in self.sources[1 if tools else 0]
        parsed = [m if isinstance(m, Message) else Message.from_dict(m) for m in messages]
        try:
            # A round trip through JSON leaves plain values only, with limited nesting.
            plain_tools = json.loads(json.dumps(list(tools or ()), sort_keys=sorts_tools))
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

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise TextError(f"`{self._name}` line {error.lineno}: {error.message}", hint=TEMPLATE_HINT) from error

    def _run(self, variables: Mapping[str, Any]) -> str:
        template = self._tool_template if variables["tools"] else self._template
        try:
            return self._environment.render(template, variables)
        except Exception as error:  # a template may fail in any way
            where = _template_line(error)
            at = f" line {where}" if where else ""
            raise TextError(f"`{self._name}`{at}: {error or type(error).__name__}", hint=TEMPLATE_HINT) from error


def check_text_files(folder: Path) -> None:
    """Check that a checkpoint's tokenizer has the special tokens of its chat template, if it has both.

    Raises:
        TextError: a file is broken, or a special token is missing.
    """
    template = ChatTemplate.find(folder)
    if template and any((folder / name).exists() for name in TOKENIZER_FILES):
        template.check_markers(Tokenizer.load_decoder(folder).special_tokens, folder)


def _template_line(error: Exception) -> int | None:
    """Return the line of the template that failed, from the traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None


def _read_text(path: Path) -> str:
    try:
        return read_regular_file(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read `{path}`: {error}") from error


def _named_templates(path: Path) -> dict[str, str]:
    """Return the templates in `chat_template` of a JSON file by name: one string is the default, or a list."""
    value = read_json(path).get("chat_template")
    if isinstance(value, str):
        return {DEFAULT_NAME: value}
    listed = cast("list[Any]", value) if isinstance(value, list) else []
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in listed}
    except (KeyError, TypeError) as error:
        raise TextError(
            f"`{path}`: `chat_template` is not a list of names and templates", hint=TEMPLATE_HINT
        ) from error
