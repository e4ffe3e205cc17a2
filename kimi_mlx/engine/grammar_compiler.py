"""Compile grammars, each once, in a background thread, so that running answers do not wait for it."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kimi_mlx.engine.call_id_tokens import CallIdTokens
from kimi_mlx.engine.json_closing import JsonClosing
from kimi_mlx.engine.token_mask import WORD_BITS, Mask
from kimi_mlx.errors import EngineError, KimiMlxError

if TYPE_CHECKING:  # importing it takes 0.1 s, and most requests have no grammar
    import llguidance

MAX_GRAMMARS = 1024
"""Maximum number of grammars in the cache: agents send the same tools with every request."""

MAX_TOOL_SETS = 64
"""Maximum number of sets of tools whose call ids are cached."""


class TokenVocabulary:
    """The vocabulary in llguidance's form. For Kimi this takes half a second, so create it once per process.

    Args:
        tokens: bytes of each token, by id; empty if an id has no token.
        special_ids: ids of control tokens, which never match text.
        end_ids: ids of tokens that end an answer.
        vocab_size: size of the logits, which may be larger than the number of tokens.

    Attributes:
        text_mask: (num_words,) uint32, mask of the tokens of text: all but control tokens.
        token_ids: ids of the tokens of text, by their bytes.
    """

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Collection[int], end_ids: Collection[int], vocab_size: int
    ):
        import llguidance

        self.vocab_size = vocab_size
        self.end_ids = frozenset(end_ids)
        self.tokens = [*tokens[:vocab_size], *[b""] * (vocab_size - len(tokens))]
        control = {*special_ids, *self.end_ids}
        self.token_ids: dict[bytes, list[int]] = defaultdict(list)
        for id, text in enumerate(self.tokens):
            if text and id not in control:
                self.token_ids[text].append(id)
        is_text = np.zeros(self.num_words * WORD_BITS, np.uint8)
        is_text[[id for ids in self.token_ids.values() for id in ids]] = 1
        self.text_mask: Mask = np.packbits(is_text, bitorder="little").view(np.uint32)
        ends = sorted(self.end_ids)
        wrapped = llguidance.TokenizerWrapper(_Tokens(self.tokens, [i for i in special_ids if i < vocab_size], ends[0]))
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=ends)
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=50_000,  # 100 MB
            max_items_in_row=10_000,  # more than the default, for objects with 1,000 optional properties
            step_max_items=200_000,
            verbose_errors=False,
        )

    @property
    def num_words(self) -> int:
        """Number of words in a mask."""
        return -(-self.vocab_size // WORD_BITS)

    def is_text(self, token: int) -> bool:
        """Return whether a token is text, not a control token."""
        return 0 <= token < self.vocab_size and token in self.token_ids.get(self.tokens[token], ())

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """Return a matcher at the beginning of a grammar. Other threads run meanwhile.

        Raises:
            EngineError: the grammar cannot be compiled.
        """
        import llguidance

        matcher = llguidance.LLMatcher(self._tokenizer, grammar, limits=self._limits, log_level=0)
        if matcher.is_error():
            raise EngineError(f"the grammar cannot be compiled: {first_line(matcher)}")
        return matcher


class _Tokens:
    """The part of a tokenizer that llguidance reads: its tokens. It cannot encode text."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special_token_ids: Sequence[int], eos_token_id: int):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_token_ids, eos_token_id

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("grammars use `no_forcing`, so no text is tokenized")


class _Compilation:
    """One grammar. The first thread that needs it compiles it; others wait."""

    def __init__(self, compile: Callable[[], llguidance.LLMatcher]):
        self._compile: Callable[[], llguidance.LLMatcher] | None = compile
        self._lock = threading.Lock()
        self._matcher: llguidance.LLMatcher | None = None
        self._error: EngineError | None = None

    @property
    def is_done(self) -> bool:
        """Whether `result` returns at once."""
        return self._matcher is not None or self._error is not None

    def result(self) -> llguidance.LLMatcher:
        """Return the matcher.

        Raises:
            EngineError: the grammar cannot be compiled.
        """
        with self._lock:
            if self._compile is not None:
                try:
                    self._matcher = self._compile()
                except KimiMlxError as error:
                    self._error = EngineError(error.message, error.hint)
                self._compile = None  # it holds the text of the grammar
        if self._matcher is None:
            assert self._error is not None
            raise EngineError(self._error.message, self._error.hint)
        return self._matcher


class GrammarCompiler:
    """Compiles grammars for one vocabulary, each once, and caches the most recently used ones.

    Args:
        load_vocabulary: reads the vocabulary; called once, when the first grammar needs it.
    """

    def __init__(self, load_vocabulary: Callable[[], TokenVocabulary]):
        self._load_vocabulary = load_vocabulary
        self._vocabulary: TokenVocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._compilations: OrderedDict[bytes, _Compilation] = OrderedDict()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._cached_call_ids = lru_cache(MAX_TOOL_SETS)(lambda names: CallIdTokens(names, self.vocabulary.token_ids))

    @property
    def has_vocabulary(self) -> bool:
        """Whether the vocabulary has been read."""
        return self._vocabulary is not None

    @property
    def vocabulary(self) -> TokenVocabulary:
        """The vocabulary. Reading it takes about a second for Kimi.

        Raises:
            KimiMlxError: the tokenizer cannot be read.
        """
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._load_vocabulary()
            return self._vocabulary

    def start(self, *grammars: str) -> None:
        """Read the vocabulary, then compile grammars in the background. Errors are raised when a grammar is used."""
        compilations = [self._compilation(grammar) for grammar in grammars]
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_jobs, name="grammars", daemon=True)
                self._thread.start()
        self._jobs.put(lambda: self.vocabulary)
        for compilation in compilations:
            if not compilation.is_done:
                self._jobs.put(compilation.result)

    def is_compiled(self, grammar: str) -> bool:
        """Return whether compilation is over, so that `matcher` returns or raises at once."""
        return self._compilation(grammar).is_done

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Return a matcher at the beginning of a grammar. Compile the grammar here, or wait for the thread that does.

        Raises:
            EngineError: the grammar cannot be compiled, or the tokenizer cannot be read.
        """
        return self._compilation(grammar).result().deep_copy()

    def call_ids(self, names: tuple[str, ...]) -> CallIdTokens:
        """Return the tokens of the ids of calls.

        Args:
            names: ids without their index.
        """
        return self._cached_call_ids(names)

    @cached_property
    def json_closing(self) -> JsonClosing:
        """Finder of the tokens that end JSON soonest."""
        return JsonClosing(self.vocabulary.token_ids)

    def drop(self, grammar: str) -> None:
        """Drop a compiled grammar whose lexer has grown too large."""
        with self._lock:
            self._compilations.pop(_digest(grammar), None)

    def _compilation(self, grammar: str) -> _Compilation:
        digest = _digest(grammar)
        with self._lock:
            compilation = self._compilations.pop(digest, None)
            if compilation is None:
                compilation = _Compilation(lambda: self.vocabulary.compile(grammar))
            self._compilations[digest] = compilation
            if len(self._compilations) > MAX_GRAMMARS:
                self._compilations.popitem(last=False)
            return compilation

    def _run_jobs(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except KimiMlxError:  # raised again when the grammar is used
                continue


def _digest(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode(errors="surrogatepass"), digest_size=16).digest()


def first_line(matcher: llguidance.LLMatcher) -> str:
    """Return the first line of a matcher's error."""
    return matcher.get_error().splitlines()[0]
