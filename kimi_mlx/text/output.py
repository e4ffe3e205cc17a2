"""Parse the answer of a model, token by token, into reasoning, text and tool calls.

    REASONING --</think>--> TEXT
    either --section--> SECTION --call--> CALL_ID --argument--> ARGUMENTS --call end--> SECTION --end--> TEXT

The parser reads ids, so a marker spelled in ordinary tokens is text. It tolerates known errors of Kimi: a section
inside the reasoning ends the reasoning, a call needs no section around it, and everything still open is closed at the
end of the answer.

A call is returned twice: in deltas while the model writes it, starting when its id is complete, and as a whole when it
is closed. Only then is it known if its arguments are JSON. If they are not, an UnparsedToolCall with the same index
follows the deltas. A call that names no tool has no deltas, only an UnparsedToolCall. Arguments that do not begin with
`{` are held back until the call is closed: they may be blank, or an object that was encoded twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import Enum, auto

from kimi_mlx.errors import TextError
from kimi_mlx.text.messages import Delta, ToolCall, ToolCallDelta, UnparsedToolCall, join
from kimi_mlx.text.tokenizer import Tokenizer
from kimi_mlx.text.tool_calls import ARGUMENT_BEGIN, normalize_arguments, parse_tool_call, tool_name

THINK_BEGIN, THINK_END = "<think>", "</think>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
# Kimi sometimes spells the section's markers like this, in ordinary tokens, around correctly marked calls.
MISSPELLED_BEGIN, MISSPELLED_END = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
REPLACEMENT = "\ufffd"


class State(Enum):
    """Part of the answer that the next ordinary token belongs to."""

    REASONING = auto()
    TEXT = auto()
    SECTION = auto()
    CALL_ID = auto()
    ARGUMENTS = auto()
    ENDED = auto()


def opens_reasoning(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Return whether a prompt ends in `<think>`, so that the answer begins with reasoning."""
    return bool(prompt) and prompt[-1] == tokenizer.special_tokens.get(THINK_BEGIN)


def parse(
    tokenizer: Tokenizer, ids: Iterable[int], starts_in_reasoning: bool = False, tool_names: Collection[str] = ()
) -> Delta:
    """Return a complete answer as one delta, equal to the sum of its streamed deltas."""
    parser = OutputParser(tokenizer, starts_in_reasoning, tool_names)
    return join([*(parser.add(token_id) for token_id in ids), parser.finish()])


class OutputParser:
    """Parser of one answer. No method raises, whatever the ids.

    Args:
        tokenizer: tokenizer of the model.
        starts_in_reasoning: True if the prompt ends in `<think>`.
        tool_names: names of the tools that the model may call, to correct inexact ids.
        free_text_tools: names of those tools whose arguments are any text instead of JSON.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        starts_in_reasoning: bool,
        tool_names: Collection[str] = (),
        free_text_tools: Collection[str] = (),
    ):
        self._tokenizer = tokenizer
        self._decoder = tokenizer.detokenizer()
        self._markers = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
        self._state = State.REASONING if starts_in_reasoning else State.TEXT
        self._held = ""  # text that may become a misspelled marker
        self._call_id: list[str] = []
        self._arguments: list[str] = []
        # whether the arguments are text or begin with `{`; None while they are blank
        self._is_object: bool | None = None
        self._num_emitted = 0  # parts of the arguments that are in deltas
        self._tool_names = frozenset(tool_names)
        self._free_text_tools = frozenset(free_text_tools)
        self._index: int | None = None  # of the open call, once its name is known
        self._num_named_calls = 0
        self._new_text = ""
        self._new_reasoning = ""
        self._new_call_deltas: list[ToolCallDelta] = []
        self._new_calls: list[ToolCall | UnparsedToolCall] = []

    def add(self, token_id: int) -> Delta:
        """Return the delta of the next token; it is empty after the end of the answer."""
        if self._state is State.ENDED:
            return Delta()
        marker = self._markers.get(token_id)
        if token_id in self._tokenizer.eos_token_ids:
            self._end()
        elif marker is not None:
            self._add_text(self._decoder.finish())
            self._process_marker(marker)
        else:
            self._add_text(self._decode(token_id))
        return self._pop_delta()

    def finish(self) -> Delta:
        """Close everything still open and return the last delta. Call it after the last token."""
        self._end(is_truncated=True)
        return self._pop_delta()

    def _decode(self, token_id: int) -> str:
        try:
            return self._decoder.add(token_id)
        except TextError:  # an id outside the vocabulary
            return self._decoder.finish() + REPLACEMENT

    def _process_marker(self, marker: str) -> None:
        """Change the state. Control tokens without a meaning here are dropped; they are never text."""
        in_call = self._state in (State.CALL_ID, State.ARGUMENTS)
        if marker == ARGUMENT_BEGIN and self._state is State.CALL_ID:
            self._state = State.ARGUMENTS
            self._name_call()
        elif marker == CALL_BEGIN:
            self._close_call(is_cut_off=True)
            self._emit_held(before_call=True)
            self._state = State.CALL_ID
        elif marker == CALL_END and in_call:
            if self._state is State.CALL_ID:
                self._begin_call_without_marker()
            self._close_call(is_cut_off=False)
            self._state = State.SECTION
        elif marker == SECTION_BEGIN:
            self._close_call(is_cut_off=True)
            self._emit_held()
            self._state = State.SECTION
        elif marker == SECTION_END:
            self._close_call(is_cut_off=True)
            self._emit_held()
            self._state = State.TEXT if in_call or self._state is State.SECTION else self._state
        elif marker in (THINK_BEGIN, THINK_END) and not in_call:
            self._emit_held()
            self._state = State.REASONING if marker == THINK_BEGIN else State.TEXT

    def _add_text(self, text: str) -> None:
        if not text:
            return
        if self._state is State.CALL_ID:
            self._call_id.append(text)
        elif self._state is State.ARGUMENTS:
            self._add_arguments(text)
        elif self._state is State.SECTION:
            self._add_text_in_section(text)
        else:
            self._add_plain_text(text)

    def _add_plain_text(self, text: str) -> None:
        """Add text, but hold back an ending that may be the misspelled beginning of a section."""
        text = self._held + text
        tail = text[text.rfind("<") :] if "<" in text else ""
        if not (MISSPELLED_BEGIN.startswith(tail) or tail.rstrip() == MISSPELLED_BEGIN):
            tail = ""
        self._held = tail
        self._emit(text[: len(text) - len(tail)])

    def _add_text_in_section(self, text: str) -> None:
        """Drop blanks and the misspelled end of the section. Any other text ends the section."""
        self._held += text
        content = self._held.lstrip()
        if content.startswith(MISSPELLED_END):
            self._held = ""
            self._state = State.TEXT
            self._add_plain_text(content.removeprefix(MISSPELLED_END))
        elif not MISSPELLED_END.startswith(content):
            text, self._held = self._held, ""
            self._state = State.TEXT
            self._add_plain_text(text)

    def _emit_held(self, before_call: bool = False) -> None:
        """Add the held-back text, without blanks in a section or a misspelled marker before a call."""
        held, self._held = self._held, ""
        if self._state is State.SECTION:
            if not held.strip():
                return
            self._state = State.TEXT
        if not (before_call and held.rstrip() == MISSPELLED_BEGIN):
            self._emit(held)

    def _emit(self, text: str) -> None:
        if self._state is State.REASONING:
            self._new_reasoning += text
        else:
            self._new_text += text

    def _name_call(self) -> None:
        """Add the first delta of the open call if its id names a tool."""
        call_id = "".join(self._call_id).strip()
        name = tool_name(call_id, self._tool_names)
        if name:
            self._index = self._num_named_calls
            self._num_named_calls += 1
            self._is_object = True if name in self._free_text_tools else None
            self._new_call_deltas.append(ToolCallDelta(self._index, call_id, name))

    def _begin_call_without_marker(self) -> None:
        """Accept a call that consists of an id only, if it names an offered tool."""
        if tool_name("".join(self._call_id), self._tool_names) in self._tool_names:
            self._state = State.ARGUMENTS
            self._name_call()

    def _add_arguments(self, text: str) -> None:
        self._arguments.append(text)
        if self._is_object is None and text.strip():
            self._is_object = text.lstrip().startswith("{")
        if self._is_object:
            self._emit_arguments("".join(self._arguments[self._num_emitted :]))
            self._num_emitted = len(self._arguments)

    def _emit_arguments(self, text: str) -> None:
        if text and self._index is not None:
            self._new_call_deltas.append(ToolCallDelta(self._index, arguments=text))

    def _close_call(self, is_cut_off: bool, is_truncated: bool = False) -> None:
        """End the open call, if there is one.

        Args:
            is_cut_off: True if the model did not close it.
            is_truncated: True if the answer was ended before the model could close it.
        """
        if self._state not in (State.CALL_ID, State.ARGUMENTS):
            return
        arguments = None
        if self._state is State.ARGUMENTS:
            arguments = "".join(self._arguments)
            if not self._is_object:
                arguments = arguments if is_truncated else normalize_arguments(arguments)
                self._emit_arguments(arguments)
        call_id = "".join(self._call_id)
        call = parse_tool_call(call_id, arguments, is_cut_off, self._index, self._tool_names, self._free_text_tools)
        self._new_calls.append(call)
        self._call_id, self._arguments, self._index = [], [], None
        self._is_object, self._num_emitted = None, 0
        self._state = State.SECTION

    def _end(self, is_truncated: bool = False) -> None:
        if self._state is State.ENDED:
            return
        self._add_text(self._decoder.finish())
        self._close_call(is_cut_off=True, is_truncated=is_truncated)
        self._emit_held()
        self._state = State.ENDED

    def _pop_delta(self) -> Delta:
        delta = Delta(self._new_text, self._new_reasoning, tuple(self._new_calls), tuple(self._new_call_deltas))
        self._new_text = self._new_reasoning = ""
        self._new_calls, self._new_call_deltas = [], []
        return delta
