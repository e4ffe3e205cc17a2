"""Holding a sequence to a grammar: which tokens may come next, as bits that mask the logits.

A mask has a bit for each token, 32 to a word, the lowest first: (ceil(vocab_size / 32),) uint32. It depends on the
grammar and the tokens so far and on nothing else, so all ranks come to the same masks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kimi_mlx.errors import EngineError

if TYPE_CHECKING:  # importing it takes 0.1 s, and most requests have no grammar
    import llguidance

Mask: TypeAlias = npt.NDArray[np.uint32]

WORD_BITS = 32
KEPT_GRAMMARS = 16
"""So many compiled grammars are kept: agents send the same tools with every request."""


class TokenVocabulary:
    """The tokens as llguidance wants them; half a second of work for Kimi's, so it is done once a process.

    Args:
        tokens: bytes of each token, by id; empty where an id has no token.
        special_ids: control tokens; no text is ever made of them.
        end_ids: those that end an answer.
        vocab_size: of the logits, which may be more than there are tokens.
    """

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Collection[int], end_ids: Collection[int], vocab_size: int
    ):
        import llguidance

        self.vocab_size = vocab_size
        self.end_ids = frozenset(end_ids)
        ends = sorted(self.end_ids)
        padded = [*tokens[:vocab_size], *[b""] * (vocab_size - len(tokens))]
        wrapped = llguidance.TokenizerWrapper(_Tokens(padded, [i for i in special_ids if i < vocab_size], ends[0]))
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=ends)
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=50_000,  # 100 MB
            max_items_in_row=10_000,  # more than the default, for objects with 1,000 optional properties
            step_max_items=200_000,
            verbose_errors=False,
        )
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    @property
    def num_words(self) -> int:
        """Of a mask."""
        return -(-self.vocab_size // WORD_BITS)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Return a matcher at the beginning of a grammar.

        Raises:
            EngineError: it cannot be compiled.
        """
        import llguidance

        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            compiled = llguidance.LLMatcher(self._tokenizer, grammar, limits=self._limits, log_level=0)
            if compiled.is_error():
                raise EngineError(f"the grammar cannot be compiled: {_first_line(compiled)}")
        self._compiled[grammar] = compiled
        if len(self._compiled) > KEPT_GRAMMARS:
            self._compiled.popitem(last=False)
        return compiled.deep_copy()

    def drop(self, grammar: str) -> None:
        """Forget a compiled grammar: what it has learned of its words in use has become too much."""
        self._compiled.pop(grammar, None)


class _Tokens:
    """What llguidance reads of a tokenizer: its tokens, without a way from text to them."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special_token_ids: Sequence[int], eos_token_id: int):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_token_ids, eos_token_id

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("grammars say `no_forcing`, so that no text is tokenized")


class Constraint:
    """Where a sequence is in its grammar.

    Args:
        vocabulary: of the model.
        grammar: of the answer, as kimi_mlx.text.grammar writes it.

    Raises:
        EngineError: the grammar cannot be compiled.
    """

    def __init__(self, vocabulary: TokenVocabulary, grammar: str):
        self._vocabulary, self._grammar = vocabulary, grammar
        self._matcher = vocabulary.matcher(grammar)
        self.is_finished = False
        """Whether a token has ended the answer."""

    def allowed(self) -> Mask:
        """Return the mask of the next token; when the grammar is complete, it allows only those that end the answer.

        Raises:
            EngineError: the grammar takes too much to go on.
        """
        mask = np.empty(self._vocabulary.num_words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        return mask

    def allowed_for_draft(self, draft: Sequence[int]) -> Mask:
        """Return the masks before each token of a draft and after the last: (len(draft) + 1, words) uint32.

        Behind an end, or a token that is not allowed, they allow everything: the draft is over there. Afterwards
        the constraint stands where it stood.

        Raises:
            EngineError: the grammar takes too much to go on.
        """
        masks = np.full((len(draft) + 1, self._vocabulary.num_words), 0xFFFFFFFF, np.uint32)
        masks[0] = self.allowed()
        taken = 0
        for token in draft:
            if token in self._vocabulary.end_ids or not self._take(token):
                break
            taken += 1
            masks[taken] = self.allowed()
        self._matcher.rollback(taken)
        self._check()
        return masks

    def advance(self, token: int) -> None:
        """Take the next token.

        Raises:
            EngineError: the token is not allowed, or the grammar takes too much to go on.
        """
        is_end = token in self._vocabulary.end_ids
        is_allowed = self._matcher.is_accepting() if is_end else self._take(token)
        self._check()
        if self.is_finished or not is_allowed:
            raise EngineError(f"token id {token} is not what the grammar allows")
        self.is_finished = is_end

    def _take(self, token: int) -> bool:
        """Take a token that ends nothing, if it is allowed."""
        return 0 <= token < self._vocabulary.vocab_size and self._matcher.try_consume_tokens([token]) == 1

    def _check(self) -> None:
        if self._matcher.is_error():
            self._vocabulary.drop(self._grammar)
            raise EngineError(f"the grammar takes too much: {_first_line(self._matcher)}", hint="simplify the schema")


def _masked(logits: mx.array, masks: mx.array) -> mx.array:
    """Return logits that are -inf where a mask does not allow the token.

    Args:
        logits: (B, vocab_size).
        masks: (B, words) uint32.
    """
    bits = (masks[..., None] >> mx.arange(WORD_BITS, dtype=mx.uint32)) & mx.array(1, mx.uint32)
    is_allowed = bits.flatten(-2)[..., : logits.shape[-1]].astype(mx.bool_)
    return mx.where(is_allowed, logits, mx.array(-mx.inf, logits.dtype))


masked = mx.compile(_masked) if mx.metal.is_available() else _masked
"""One kernel on Metal; on the CPU mx.compile calls a C++ compiler."""


def _first_line(matcher: llguidance.LLMatcher) -> str:
    return matcher.get_error().splitlines()[0]
