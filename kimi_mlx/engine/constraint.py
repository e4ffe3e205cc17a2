"""Constrained decoding: bit masks of the tokens that a grammar allows next.

A mask has a bit for each token, 32 per word, lowest bit first: (ceil(vocab_size / 32),) uint32. It depends only on the
grammar and the tokens so far, so all ranks compute the same masks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kimi_mlx.errors import EngineError
from kimi_mlx.model.device import compile_on_gpu

if TYPE_CHECKING:  # importing it takes 0.1 s, and most requests have no grammar
    import llguidance

Mask: TypeAlias = npt.NDArray[np.uint32]

WORD_BITS = 32
KEPT_GRAMMARS = 16
"""Number of compiled grammars that are kept, because agents send the same tools with every request."""


class TokenVocabulary:
    """The vocabulary in llguidance's form. For Kimi this takes half a second, so create it once per process.

    Args:
        tokens: bytes of each token, by id; empty if an id has no token.
        special_ids: ids of control tokens, which never match text.
        end_ids: ids of tokens that end an answer.
        vocab_size: size of the logits, which may be larger than the number of tokens.
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
        """Number of words in a mask."""
        return -(-self.vocab_size // WORD_BITS)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Return a matcher at the beginning of a grammar.

        Raises:
            EngineError: the grammar cannot be compiled.
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
        """Drop a compiled grammar whose lexer has grown too large."""
        self._compiled.pop(grammar, None)


class _Tokens:
    """The part of a tokenizer that llguidance reads: its tokens. It cannot encode text."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special_token_ids: Sequence[int], eos_token_id: int):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_token_ids, eos_token_id

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("grammars use `no_forcing`, so no text is tokenized")


class Constraint:
    """The state of a sequence in its grammar.

    Args:
        vocabulary: vocabulary of the model.
        grammar: grammar of the answer, as written by kimi_mlx.text.grammar.

    Raises:
        EngineError: the grammar cannot be compiled.
    """

    def __init__(self, vocabulary: TokenVocabulary, grammar: str):
        self._vocabulary, self._grammar = vocabulary, grammar
        self._matcher = vocabulary.matcher(grammar)
        self.is_finished = False
        """Whether an end token was appended."""

    def allowed(self) -> Mask:
        """Return the mask of the next token. Once the grammar is complete, it allows only end tokens.

        Raises:
            EngineError: the grammar exceeds the limits.
        """
        mask = np.empty(self._vocabulary.num_words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        return mask

    def allowed_for_draft(self, draft: Sequence[int]) -> Mask:
        """Return the masks before each token of a draft and after the last: (len(draft) + 1, words) uint32.

        After an end token or a forbidden token the masks allow everything, because the draft is rejected there. The
        state of the constraint does not change.

        Raises:
            EngineError: the grammar exceeds the limits.
        """
        masks = np.full((len(draft) + 1, self._vocabulary.num_words), 0xFFFFFFFF, np.uint32)
        masks[0] = self.allowed()
        num_consumed = 0
        for token in draft:
            if token in self._vocabulary.end_ids or not self._consume(token):
                break
            num_consumed += 1
            masks[num_consumed] = self.allowed()
        self._matcher.rollback(num_consumed)
        self._check()
        return masks

    def advance(self, token: int) -> None:
        """Append a token.

        Raises:
            EngineError: the token is not allowed, or the grammar exceeds the limits.
        """
        is_end = token in self._vocabulary.end_ids
        is_allowed = self._matcher.is_accepting() if is_end else self._consume(token)
        self._check()
        if self.is_finished or not is_allowed:
            raise EngineError(f"the grammar does not allow token id {token}")
        self.is_finished = is_end

    def _consume(self, token: int) -> bool:
        """Append a token that is not an end token; return whether it is allowed."""
        return 0 <= token < self._vocabulary.vocab_size and self._matcher.try_consume_tokens([token]) == 1

    def _check(self) -> None:
        if self._matcher.is_error():
            self._vocabulary.drop(self._grammar)
            raise EngineError(f"the grammar is too complex: {_first_line(self._matcher)}", hint="simplify the schema")


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


def _first_line(matcher: llguidance.LLMatcher) -> str:
    return matcher.get_error().splitlines()[0]
