"""Constrained decoding: bit masks of the tokens that may come next in an answer.

An answer consists of parts, and control tokens lead from one to the next:

    START --<think>--> REASONING --</think>--> CONTENT
    CONTENT, FREE --section begin--> SECTION --call begin--> CALL_ID --argument begin--> ARGUMENTS
    ARGUMENTS --call end--> AFTER_CALL --section end--> END, or FREE again

Only the JSON of a response and the arguments of each tool are grammars, compiled by llguidance. In the other parts the
masks follow from the vocabulary and from the names of the tools. In FREE there is no mask at all.

A mask (kimi_mlx.engine.token_mask) depends only on the rules of the answer and the tokens so far, so all ranks compute
the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kimi_mlx.engine.answer_rules import AnswerRules, Part
from kimi_mlx.engine.call_id_tokens import CallIdTokens
from kimi_mlx.engine.grammar_compiler import GrammarCompiler, TokenVocabulary, first_line
from kimi_mlx.engine.json_closing import BEGINNING, JsonPlace
from kimi_mlx.engine.token_mask import EVERYTHING, WORD_BITS, Mask, first_token, has_token, set_tokens
from kimi_mlx.errors import EngineError

if TYPE_CHECKING:
    import llguidance

CLOSING_MARGIN = 48
"""Spare tokens when an answer is closed, at most an eighth of its maximum: one token may open several objects."""

MAX_CLOSING = 1024
"""Maximum number of tokens that close an answer."""


@dataclass(frozen=True)
class _State:
    """State of an answer.

    Args:
        part: part of the next token.
        num_calls: number of calls that have begun.
        call_id: id of the call so far.
        matcher: matcher of its arguments; it changes with each token.
        grammar: grammar of the matcher.
        place: position in the JSON of the arguments.
        num_tokens: number of tokens of the answer.
        next_check: number of tokens at which to check again whether to close the answer.
        is_closing: whether only the tokens that end the answer soonest are allowed.
    """

    part: Part
    num_calls: int = 0
    call_id: bytes = b""
    matcher: llguidance.LLMatcher | None = None
    grammar: str = ""
    place: JsonPlace = BEGINNING
    num_tokens: int = 0
    next_check: int = 0
    is_closing: bool = False


class _LimitError(Exception):
    """A grammar exceeds the limits, or cannot be compiled."""

    def __init__(self, grammar: str, error: EngineError):
        super().__init__(grammar)
        self.grammar, self.error = grammar, error


class Constraint:
    """The rules of one answer, and its state in them.

    Each matcher is created when it is first needed, which waits until its grammar is compiled.

    Args:
        compiler: compiler for the model's vocabulary.
        grammar: rules of the answer, as written by kimi_mlx.text.grammar.

    Raises:
        EngineError: the rules are not in the form that kimi_mlx.text.grammar writes.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: str):
        self._compiler = compiler
        self._rules = rules = AnswerRules.from_json(grammar)
        try:
            self._state = _State(Part[rules.start])
        except KeyError as error:
            raise EngineError(f"the grammar cannot be compiled: no part `{rules.start}`") from error
        token = rules.tokens.get
        self._think_begin, self._think_end = token("think_begin"), token("think_end")
        self._section_begin, self._section_end = token("section_begin"), token("section_end")
        self._call_begin, self._call_end = token("call_begin"), token("call_end")
        self._argument_begin = token("argument_begin")
        self._triggers = frozenset((self._section_begin, self._call_begin) if rules.arguments else ())
        self._grammars = {name.encode(errors="replace"): grammar for name, grammar in rules.arguments.items()}
        self._response_matcher: llguidance.LLMatcher | None = None
        self._arguments: list[int] = []
        """Tokens of the call's arguments so far."""
        self._too_complex: set[str] = set()
        """Grammars of arguments that exceeded the limits; any object is allowed instead."""
        self._max_tokens: int | None = None
        self.is_finished = False
        """Whether an end token was appended; always False in the part FREE."""

    def limit_tokens(self, max_tokens: int) -> None:
        """Set the maximum number of tokens of the answer; call it before the first token."""
        if self._rules.ends_in_time:
            self._max_tokens = max_tokens

    @property
    def was_shortened(self) -> bool:
        """Whether the answer was closed early because of its maximum number of tokens."""
        return self._state.is_closing

    def start_compiling(self) -> None:
        """Compile all grammars in the background."""
        response = self._rules.response
        self._compiler.start(*([] if response is None else [response]), *self._rules.arguments.values())

    @property
    def is_compiled(self) -> bool:
        """Whether the first mask can be computed without waiting for the compiler."""
        response = self._rules.response
        if self._state.part is Part.FREE:
            return True
        return self._compiler.has_vocabulary and (response is None or self._compiler.is_compiled(response))

    def is_free(self, draft: Sequence[int] = ()) -> bool:
        """Return whether all tokens are allowed, after the sequence and after each token of a draft."""
        return self._state.part is Part.FREE and self._triggers.isdisjoint(draft)

    def allowed(self) -> Mask:
        """Return the mask of the next token. Once the answer is complete, it allows only end tokens.

        Raises:
            EngineError: a grammar cannot be compiled, or exceeds the limits.
        """
        return self.allowed_for_draft(())[0]

    def allowed_for_draft(self, draft: Sequence[int]) -> Mask:
        """Return the masks before each token of a draft and after the last: (len(draft) + 1, words) uint32.

        After an end token or a forbidden token the masks allow everything, because the draft is rejected there. The
        state of the constraint does not change.

        Raises:
            EngineError: a grammar cannot be compiled, or exceeds the limits.
        """
        while True:
            try:
                return self._masks(draft)
            except _LimitError as limit:
                self._fall_back(limit)

    def num_allowed(self, draft: Sequence[int]) -> int:
        """Return the number of leading draft tokens that are allowed.

        Raises:
            EngineError: a grammar cannot be compiled, or exceeds the limits.
        """
        if self.is_free(draft):
            return len(draft)
        masks = self.allowed_for_draft(draft)
        bits = ((int(masks[at, token // WORD_BITS]) >> token % WORD_BITS) & 1 for at, token in enumerate(draft))
        return next((at for at, is_allowed in enumerate(bits) if not is_allowed), len(draft))

    def advance(self, token: int) -> None:
        """Append a token.

        Raises:
            EngineError: the token is not allowed, or a grammar cannot be compiled or exceeds the limits.
        """
        if self.is_free([token]):
            return
        is_end = token in self._vocabulary.end_ids
        while True:
            try:
                is_allowed = not self.is_finished and (self._can_end() if is_end else self._append(token, []))
                break
            except _LimitError as limit:
                self._fall_back(limit)
        if not is_allowed:
            raise EngineError(f"the grammar does not allow token id {token}")
        self.is_finished = is_end
        if self._state.part is not Part.ARGUMENTS:
            self._arguments.clear()
        elif token != self._argument_begin:
            self._arguments.append(token)

    @property
    def _vocabulary(self) -> TokenVocabulary:
        return self._compiler.vocabulary

    @property
    def _may_call(self) -> bool:
        """Whether another call may begin."""
        max_calls = self._rules.max_calls
        return bool(self._rules.arguments) and (max_calls is None or self._state.num_calls < max_calls)

    @property
    def _call_index(self) -> int:
        """Index of the call that has begun."""
        return self._rules.first_index + self._state.num_calls - 1

    def _masks(self, draft: Sequence[int]) -> Mask:
        masks = np.full((len(draft) + 1, self._vocabulary.num_words), EVERYTHING, np.uint32)
        begin = self._state
        matchers: list[llguidance.LLMatcher] = []
        try:
            self._check_closing()
            self._write_mask(masks[0])
            for row, token in enumerate(draft, 1):
                if token in self._vocabulary.end_ids or not self._append(token, matchers):
                    break
                self._write_mask(masks[row])
        finally:
            self._restore(begin, matchers)
        return masks

    def _restore(self, state: _State, matchers: list[llguidance.LLMatcher]) -> None:
        """Return to an earlier state.

        Args:
            state: the state.
            matchers: matchers that have accepted a token since then, one entry per token.
        """
        self._state = state
        for matcher in reversed(matchers):
            matcher.rollback(1)

    def _write_mask(self, mask: Mask) -> None:
        """Write the mask of the next token into a mask that allows everything."""
        self._write_full_mask(mask)
        if self._state.is_closing:
            closing = [token for token in self._closing_tokens(mask) if token is not None]
            if closing:
                mask[:] = 0
                set_tokens(mask, closing)

    def _closing_tokens(self, mask: Mask) -> Sequence[int | None]:
        """Return the tokens of a mask that end the answer soonest; none if all are equally good."""
        part = self._state.part
        if part is Part.CALL_ID:
            if has_token(mask, self._argument_begin):
                return [self._argument_begin]
            tokens, texts = self._call_ids.next_tokens(self._state.call_id, self._call_index), self._vocabulary.tokens
            return [max(tokens, key=lambda token: len(texts[token]))] if tokens else []
        if part is Part.ARGUMENTS:
            if has_token(mask, self._call_end):
                return [self._call_end]
            groups = self._compiler.json_closing.groups(self._state.place)
            allowed = ([token for token in group if has_token(mask, token)] for group in groups)
            return next(filter(None, allowed), [])
        best = (self._think_end, self._section_begin, self._section_end, self._call_begin)
        return [next((token for token in best if has_token(mask, token)), None)]

    def _write_full_mask(self, mask: Mask) -> None:
        """Write the mask of all tokens that may come next."""
        state, vocabulary = self._state, self._vocabulary
        match state.part:
            case Part.FREE:
                return
            case Part.ARGUMENTS:
                self._write_matcher_mask(state.matcher, state.grammar, mask)
                set_tokens(mask, vocabulary.end_ids, False)  # the answer cannot end inside a call
                if state.matcher is not None and state.matcher.is_accepting():
                    self._allow(mask, self._call_end)
                return
            case Part.RESPONSE:
                self._write_matcher_mask(self._response(), self._rules.response or "", mask)
                return
            case Part.START | Part.CONTENT:
                self._write_content_mask(mask)
            case Part.REASONING:
                mask[:] = vocabulary.text_mask
                self._allow(mask, self._think_end)
            case Part.SECTION:
                mask[:] = 0
                self._allow(mask, self._call_begin)
            case Part.CALL_ID:
                mask[:] = 0
                set_tokens(mask, self._call_ids.next_tokens(state.call_id, self._call_index))
                if self._call_ids.is_complete(state.call_id, self._call_index):
                    self._allow(mask, self._argument_begin)
            case Part.AFTER_CALL:
                mask[:] = 0
                self._allow(mask, self._section_end, *([self._call_begin] if self._may_call else []))
            case Part.END:
                mask[:] = 0
                set_tokens(mask, vocabulary.end_ids)

    def _write_content_mask(self, mask: Mask) -> None:
        vocabulary = self._vocabulary
        if self._rules.response is not None:
            self._write_matcher_mask(self._response(), self._rules.response, mask)
        elif self._rules.has_text:
            mask[:] = vocabulary.text_mask
            set_tokens(mask, vocabulary.end_ids)
        else:
            mask[:] = 0
        if self._may_call:
            self._allow(mask, self._section_begin)
        if self._state.part is Part.START:
            self._allow(mask, self._think_begin)

    def _write_matcher_mask(self, matcher: llguidance.LLMatcher | None, grammar: str, mask: Mask) -> None:
        assert matcher is not None
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check(matcher, grammar)

    def _allow(self, mask: Mask, *tokens: int | None) -> None:
        set_tokens(mask, [token for token in tokens if token is not None])

    def _can_end(self) -> bool:
        """Return whether the answer may end."""
        match self._state.part:
            case Part.FREE | Part.END:
                return True
            case Part.START | Part.CONTENT | Part.RESPONSE if self._rules.response is not None:
                return self._response().is_accepting()
            case Part.START | Part.CONTENT:
                return self._rules.has_text
            case _:
                return False

    def _append(self, token: int, matchers: list[llguidance.LLMatcher]) -> bool:
        """Append a token that is not an end token; return whether it is allowed. The arguments are those of _accept."""
        if not self._accept(token, matchers):
            return False
        self._state = replace(self._state, num_tokens=self._state.num_tokens + 1)
        self._check_closing()
        return True

    def _check_closing(self) -> None:
        """Start to close the answer if the remaining tokens are only just enough for that."""
        state = self._state
        if self._max_tokens is None or state.is_closing or state.num_tokens < state.next_check:
            return
        margin = min(CLOSING_MARGIN, self._max_tokens // 8)
        spare = self._max_tokens - state.num_tokens - margin - self._num_closing_tokens()
        if spare <= 0:
            self._state = replace(state, is_closing=True)
        else:
            self._state = replace(state, next_check=state.num_tokens + 1 + spare // 4)

    def _num_closing_tokens(self) -> int:
        """Return the number of tokens that closing the answer takes, at most MAX_CLOSING + 1."""
        begin = self._state
        matchers: list[llguidance.LLMatcher] = []
        mask = np.empty(self._vocabulary.num_words, np.uint32)
        count = 0
        try:
            while not self._can_end() and count < MAX_CLOSING:
                self._state = replace(self._state, is_closing=True)
                mask[:] = EVERYTHING
                self._write_mask(mask)
                token = first_token(mask)
                if token is None or not self._accept(token, matchers):
                    return MAX_CLOSING
                count += 1
        finally:
            self._restore(begin, matchers)
        return count + 1

    def _accept(self, token: int, matchers: list[llguidance.LLMatcher]) -> bool:
        """Append a token that is not an end token; return whether it is allowed.

        Args:
            token: token.
            matchers: list to which the matcher that accepts the token is appended, if there is one.
        """
        state = self._state
        part = state.part
        if part is Part.START and token == self._think_begin:
            part = Part.REASONING
        elif part in (Part.FREE, Part.START, Part.CONTENT) and token == self._section_begin and self._may_call:
            part = Part.SECTION
        elif part in (Part.FREE, Part.SECTION, Part.AFTER_CALL) and token == self._call_begin and self._may_call:
            self._state = replace(state, part=Part.CALL_ID, num_calls=state.num_calls + 1, call_id=b"")
            return True
        elif part is Part.AFTER_CALL and token == self._section_end:
            part = Part.FREE if self._rules.start == Part.FREE.name and self._may_call else Part.END
        elif part is Part.REASONING and token == self._think_end:
            part = Part.CONTENT
        elif part is Part.CALL_ID:
            return self._accept_in_call_id(token)
        elif part is Part.ARGUMENTS:
            return self._accept_in_arguments(token, matchers)
        elif part in (Part.START, Part.CONTENT, Part.RESPONSE) and self._rules.response is not None:
            part = Part.RESPONSE
            if not self._consume(self._response(), self._rules.response, token, matchers):
                return False
        elif part is Part.REASONING or (part in (Part.START, Part.CONTENT) and self._rules.has_text):
            part = Part.CONTENT if part is Part.START else part
            if not self._vocabulary.is_text(token):
                return False
        elif part is not Part.FREE:
            return False
        self._state = replace(state, part=part)
        return True

    def _accept_in_call_id(self, token: int) -> bool:
        state = self._state
        if token == self._argument_begin:
            if not self._call_ids.is_complete(state.call_id, self._call_index):
                return False
            grammar = self._grammars[state.call_id.rpartition(b":")[0]]
            grammar = self._rules.any_object if grammar in self._too_complex else grammar
            matcher = self._matcher(grammar)
            self._state = replace(state, part=Part.ARGUMENTS, matcher=matcher, grammar=grammar, place=BEGINNING)
            return True
        if not self._vocabulary.is_text(token):
            return False
        call_id = state.call_id + self._vocabulary.tokens[token]
        self._state = replace(state, call_id=call_id)
        return self._call_ids.is_beginning(call_id, self._call_index)

    def _accept_in_arguments(self, token: int, matchers: list[llguidance.LLMatcher]) -> bool:
        state = self._state
        assert state.matcher is not None
        if token == self._call_end:
            self._state = replace(state, part=Part.AFTER_CALL, matcher=None, grammar="")
            return state.matcher.is_accepting()
        if not self._consume(state.matcher, state.grammar, token, matchers):
            return False
        if self._max_tokens is not None:
            self._state = replace(state, place=state.place.after(self._vocabulary.tokens[token]))
        return True

    def _consume(
        self, matcher: llguidance.LLMatcher, grammar: str, token: int, matchers: list[llguidance.LLMatcher]
    ) -> bool:
        """Append a token to a matcher, if it is allowed."""
        is_allowed = 0 <= token < self._vocabulary.vocab_size and matcher.try_consume_tokens([token]) == 1
        self._check(matcher, grammar)
        if is_allowed:
            matchers.append(matcher)
        return is_allowed

    @property
    def _call_ids(self) -> CallIdTokens:
        return self._compiler.call_ids(tuple(self._rules.arguments))

    def _response(self) -> llguidance.LLMatcher:
        """Return the matcher of the response."""
        if self._response_matcher is None:
            assert self._rules.response is not None
            self._response_matcher = self._matcher(self._rules.response)
        return self._response_matcher

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        _ = self._vocabulary  # an error of the tokenizer is not one of the schema
        try:
            return self._compiler.matcher(grammar)
        except EngineError as error:
            raise _LimitError(grammar, EngineError(f"the schema of the answer: {error.message}", error.hint)) from error

    def _check(self, matcher: llguidance.LLMatcher, grammar: str) -> None:
        if matcher.is_error():
            self._compiler.drop(grammar)
            error = EngineError(
                f"the schema of the answer is too complex ({first_line(matcher)}): "
                "use fewer or shorter patterns, enums and limits of lengths"
            )
            raise _LimitError(grammar, error)

    def _fall_back(self, limit: _LimitError) -> None:
        """Allow any object as the arguments of a tool. All ranks meet the limits at the same token.

        Raises:
            EngineError: the grammar is not that of arguments.
        """
        grammar, rules = limit.grammar, self._rules
        if grammar in (rules.any_object, rules.response):
            raise limit.error
        self._too_complex.add(grammar)
        if self._state.grammar == grammar and self._state.part is Part.ARGUMENTS:
            matcher = self._matcher(rules.any_object)
            if matcher.try_consume_tokens(self._arguments) != len(self._arguments):
                raise limit.error
            self._state = replace(self._state, matcher=matcher, grammar=rules.any_object)
