"""Constrained decoding: bit masks of the tokens that a grammar allows next.

A mask has a bit for each token, 32 per word, lowest bit first: (ceil(vocab_size / 32),) uint32. It depends only on the
grammar and the tokens so far, so all ranks compute the same masks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kimi_mlx.engine.grammar_compiler import WORD_BITS, GrammarCompiler, TokenVocabulary, first_line
from kimi_mlx.errors import EngineError
from kimi_mlx.model.device import compile_on_gpu

if TYPE_CHECKING:
    import llguidance

Mask: TypeAlias = npt.NDArray[np.uint32]


class Constraint:
    """The state of a sequence in its grammar.

    There are two matchers. Between argument-begin and call-end, the one for the called tool's arguments is used;
    elsewhere, the one for the answer. Each is created when it is first needed, which waits until it is compiled.

    Args:
        compiler: compiler for the model's vocabulary.
        grammar: grammar of the answer, as written by kimi_mlx.text.grammar.

    Raises:
        EngineError: the grammar is not in the form that kimi_mlx.text.grammar writes.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: str):
        self._compiler = compiler
        try:
            parts: dict[str, Any] = json.loads(grammar)
            self._answer_grammar: str = parts["answer"]
            self._arguments_grammars: dict[str, str] = parts.get("arguments", {})
            self._call_begin, self._argument_begin, self._call_end = parts.get("call_tokens", (None, None, None))
        except (ValueError, TypeError, KeyError) as error:
            raise EngineError(f"the grammar cannot be compiled: {error!r}") from error
        self._answer_matcher: llguidance.LLMatcher | None = None
        self._arguments_matcher: llguidance.LLMatcher | None = None
        self._arguments_grammar = ""
        self._call_id: bytes | None = None  # text between call-begin and argument-begin
        self.is_finished = False
        """Whether an end token was appended."""

    def start_compiling(self) -> None:
        """Compile all parts of the grammar in the background."""
        self._compiler.start(self._answer_grammar, *self._arguments_grammars.values())

    @property
    def is_compiled(self) -> bool:
        """Whether the first mask can be computed without waiting for the compiler."""
        return self._compiler.is_compiled(self._answer_grammar)

    def allowed(self) -> Mask:
        """Return the mask of the next token. Once the grammar is complete, it allows only end tokens.

        Raises:
            EngineError: the grammar cannot be compiled, or exceeds the limits.
        """
        matcher = self._arguments_matcher or self._answer
        vocabulary = self._vocabulary
        mask = np.empty(vocabulary.num_words, np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check(matcher)
        if matcher is self._arguments_matcher:
            for token in vocabulary.end_ids:  # the answer cannot end inside a call
                mask[token // WORD_BITS] &= ~np.uint32(1 << token % WORD_BITS)
            if matcher.is_accepting():
                mask[self._call_end // WORD_BITS] |= np.uint32(1 << self._call_end % WORD_BITS)
        return mask

    def allowed_for_draft(self, draft: Sequence[int]) -> Mask:
        """Return the masks before each token of a draft and after the last: (len(draft) + 1, words) uint32.

        After an end token or a forbidden token the masks allow everything, because the draft is rejected there. The
        state of the constraint does not change.

        Raises:
            EngineError: the grammar exceeds the limits.
        """
        first = self.allowed()
        masks = np.full((len(draft) + 1, first.size), 0xFFFFFFFF, np.uint32)
        masks[0] = first
        states: list[tuple[Any, ...]] = []
        matchers: list[llguidance.LLMatcher] = []
        for token in draft:
            states.append((self._arguments_matcher, self._arguments_grammar, self._call_id))
            matcher = None if token in self._vocabulary.end_ids else self._accept(token)
            if matcher is None:
                break
            matchers.append(matcher)
            masks[len(matchers)] = self.allowed()
        for matcher in reversed(matchers):
            matcher.rollback(1)
            self._check(matcher)
        if states:
            self._arguments_matcher, self._arguments_grammar, self._call_id = states[0]
        return masks

    def num_allowed(self, draft: Sequence[int]) -> int:
        """Return the number of leading draft tokens that the grammar allows.

        Raises:
            EngineError: the grammar cannot be compiled, or exceeds the limits.
        """
        masks = self.allowed_for_draft(draft)
        bits = ((int(masks[at, token // WORD_BITS]) >> token % WORD_BITS) & 1 for at, token in enumerate(draft))
        return next((at for at, is_allowed in enumerate(bits) if not is_allowed), len(draft))

    def advance(self, token: int) -> None:
        """Append a token.

        Raises:
            EngineError: the token is not allowed, or the grammar cannot be compiled or exceeds the limits.
        """
        answer = self._answer
        is_end = token in self._vocabulary.end_ids
        can_end = self._arguments_matcher is None and answer.is_accepting()
        is_allowed = can_end if is_end else self._accept(token) is not None
        self._check(self._arguments_matcher or answer)
        if self.is_finished or not is_allowed:
            raise EngineError(f"the grammar does not allow token id {token}")
        self.is_finished = is_end

    @property
    def _vocabulary(self) -> TokenVocabulary:
        return self._compiler.vocabulary

    @property
    def _answer(self) -> llguidance.LLMatcher:
        if self._answer_matcher is None:
            self._answer_matcher = self._matcher(self._answer_grammar)
        return self._answer_matcher

    def _accept(self, token: int) -> llguidance.LLMatcher | None:
        """Append a token that is not an end token; return the matcher that accepted it, or None if it is forbidden."""
        if not 0 <= token < self._vocabulary.vocab_size:
            return None
        if self._arguments_matcher is not None:
            if token != self._call_end:
                return self._arguments_matcher if self._arguments_matcher.try_consume_tokens([token]) == 1 else None
            if not self._arguments_matcher.is_accepting():
                return None
        if self._answer.try_consume_tokens([token]) != 1:
            return None
        if token == self._call_begin:
            self._call_id = b""
        elif token == self._argument_begin:
            name = (self._call_id or b"").decode().rpartition(":")[0]  # without the index of the call
            self._arguments_grammar, self._call_id = self._arguments_grammars[name], None
            self._arguments_matcher = self._matcher(self._arguments_grammar)
        elif token == self._call_end:
            self._arguments_matcher = None
        elif self._call_id is not None:
            self._call_id += self._vocabulary.tokens[token]
        return self._answer

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        _ = self._vocabulary  # an error of the tokenizer is not one of the schema
        try:
            return self._compiler.matcher(grammar)
        except EngineError as error:
            raise EngineError(f"the schema of {self._subject(grammar)}: {error.message}", error.hint) from error

    def _check(self, matcher: llguidance.LLMatcher) -> None:
        if matcher.is_error():
            grammar = self._answer_grammar if matcher is self._answer_matcher else self._arguments_grammar
            self._compiler.drop(grammar)
            raise EngineError(
                f"the schema of {self._subject(grammar)} is too complex ({first_line(matcher)}): "
                "use fewer or shorter patterns, enums and limits of lengths"
            )

    def _subject(self, grammar: str) -> str:
        """Return whose grammar this is, for an error message: the answer's, or that of tools by name."""
        names = [name.partition(".")[2] for name, other in self._arguments_grammars.items() if other == grammar]
        if grammar == self._answer_grammar or not names:
            return "the answer"
        return ("the tool " if len(names) == 1 else "the tools ") + ", ".join(f"`{name}`" for name in names[:3])


@compile_on_gpu
def masked(logits: mx.array, masks: mx.array) -> mx.array:
    """Return logits with -inf for the tokens that a mask forbids.

    Args:
        logits: (B, vocab_size).
        masks: (B, words) uint32.
    """
    bits = (masks[..., None] >> mx.arange(WORD_BITS, dtype=mx.uint32)) & mx.array(1, mx.uint32)
    is_allowed = bits.flatten(-2)[..., : logits.shape[-1]].astype(mx.bool_)
    return mx.where(is_allowed, logits, mx.array(-mx.inf, logits.dtype))
