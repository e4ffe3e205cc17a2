"""Convert text to token ids and back.

The tokenizer is built here from the vocabulary file of the checkpoint; no code of the checkpoint runs. Plain text never
becomes a control token: the `tokenizers` object has none, and a caller that wants one uses its id.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers

from kimi_mlx.errors import TextError
from kimi_mlx.files import read_regular_file
from kimi_mlx.text import vocabulary
from kimi_mlx.text.fast_tokenizer import read_fast_tokenizer
from kimi_mlx.text.vocabulary_cache import cached_splits

NUM_RESERVED_SPECIAL_TOKENS = 256
# Kimi's own limits: longer text is split before the pattern is applied, and the splits are visible in the ids.
MAX_ENCODE_CHARS = 400_000
MAX_RUN_CHARS = 25_000
LONG_RUN = re.compile(rf"\s{{{MAX_RUN_CHARS + 1},}}|\S{{{MAX_RUN_CHARS + 1},}}")
TOKENIZER_FILES = ("tiktoken.model", "tokenizer.json")
END_TOKENS = ("[EOS]", "<|im_end|>")


class Tokenizer:
    """The tokenizer of one checkpoint.

    Args:
        bpe: byte-level BPE without added tokens.
        tokens: bytes of each ordinary token, by id.
        special_tokens: id of each added token, by its text.
        eos_token_ids: ids that end an answer.
    """

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        tokens: Mapping[int, bytes],
        special_tokens: Mapping[str, int],
        eos_token_ids: Iterable[int] = (),
    ):
        self._bpe = bpe
        self.special_tokens = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        self._tokens = {**tokens, **{i: text.encode() for text, i in self.special_tokens.items()}}
        ends = [self.special_tokens[text] for text in END_TOKENS if text in self.special_tokens]
        self.eos_token_ids = frozenset([*eos_token_ids, *ends])
        self.vocab_size = max(self._tokens) + 1
        self.max_token_bytes = max(map(len, self._tokens.values()))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tiktoken.model`, else `tokenizer.json`, and the configuration files next to it.

        Raises:
            TextError: a file is missing or broken.
        """
        return cls._read(Path(folder), _read_bpe)

    @classmethod
    def find(cls, folder: Path) -> Tokenizer | None:
        """Read the tokenizer as `load` does; return None if the folder has none.

        Raises:
            TextError: a file is broken.
        """
        return cls.load(folder) if any((Path(folder) / name).exists() for name in TOKENIZER_FILES) else None

    @classmethod
    def load_decoder(cls, folder: Path) -> Tokenizer:
        """Read only the tokens, in a fraction of the time. Such a tokenizer can decode but not encode.

        Raises:
            TextError: a file is missing or broken.
        """
        return cls._read(Path(folder), lambda tokens, path: tokenizers.Tokenizer(tokenizers.models.BPE()))

    @classmethod
    def _read(cls, folder: Path, read_bpe: Callable[[Sequence[bytes], Path], tokenizers.Tokenizer]) -> Tokenizer:
        added = _added_tokens(folder)
        eos_token_ids = _eos_token_ids(folder)
        path, fast_path = folder / "tiktoken.model", folder / "tokenizer.json"
        if path.exists():
            tokens = vocabulary.read_ranks(path)
            added = {**_listed_tokens(fast_path), **added}
            special = _special_tokens(tokens, added, path)
            return cls(read_bpe(tokens, path), dict(enumerate(tokens)), special, eos_token_ids)
        if fast_path.exists():
            return cls(*read_fast_tokenizer(fast_path, added), eos_token_ids)
        raise TextError(
            f"`{folder}` has neither `tiktoken.model` nor `tokenizer.json`",
            hint="use the folder of a complete checkpoint",
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text. Text that spells a control token stays text."""
        ids: list[int] = []
        for chunk in _split_long(text):
            encoding = self._bpe.encode_batch_fast([_well_formed(chunk)], add_special_tokens=False)[0]
            ids += encoding.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, control tokens included; invalid UTF-8 becomes U+FFFD.

        Raises:
            TextError: an id is not in the vocabulary.
        """
        return b"".join([self.token_bytes(token_id) for token_id in ids]).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token.

        Raises:
            TextError: the id is not in the vocabulary.
        """
        try:
            return self._tokens[token_id]
        except KeyError:
            message = f"token id {token_id} is not in the vocabulary of {self.vocab_size} ids"
            raise TextError(message, hint="use the model and the tokenizer of the same checkpoint") from None

    def tokens(self) -> list[bytes]:
        """Return the bytes of every token, by id; empty where an id has no token."""
        return [self._tokens.get(i, b"") for i in range(self.vocab_size)]

    def detokenizer(self) -> Detokenizer:
        """Return a decoder for one stream of ids."""
        return Detokenizer(self)


class TokenIdTokenizer(Tokenizer):
    """Replacement for the tokenizer of a checkpoint without one: token 12 decodes to the text `12 `.

    Args:
        folder: folder of the checkpoint, for error messages.
        vocab_size: number of token ids.
        eos_token_ids: ids that end an answer.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Iterable[int] = ()):
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        super().__init__(bpe, {i: f"{i} ".encode() for i in range(vocab_size)}, {}, eos_token_ids)
        self._folder = folder

    @classmethod
    def load(cls, folder: Path) -> TokenIdTokenizer:
        """Read the size of the vocabulary and the end tokens from the configuration files.

        Raises:
            TextError: a file is broken, or `config.json` has no `vocab_size`.
        """
        config = read_json(folder / "config.json")
        text_config = config.get("text_config")
        sizes = [cast("dict[str, Any]", values).get("vocab_size") for values in (config, text_config) if values]
        size = next((size for size in sizes if isinstance(size, int)), 0)
        if size < 1:
            raise TextError(f"`{folder}` has neither a tokenizer nor a `vocab_size` in its `config.json`")
        return cls(folder, size, _eos_token_ids(folder))

    def encode(self, text: str) -> list[int]:
        """Refuse text: there is no vocabulary.

        Raises:
            TextError: always.
        """
        raise TextError(
            f"`{self._folder}` has no tokenizer (`{'` or `'.join(TOKENIZER_FILES)}`), so it cannot read text",
            hint="send token ids to /v1/completions, or add the tokenizer's files to the folder",
        )


class Detokenizer:
    """Decodes a stream of ids; text is returned as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Return the text that this id completes; it may be empty.

        Raises:
            TextError: the id is not in the vocabulary.
        """
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return U+FFFD if an incomplete character is left, else an empty string."""
        return self._decoder.decode(b"", final=True)


def _split_long(text: str) -> Iterator[str]:
    """Split text as Kimi does: every 400,000 characters, then within runs of over 25,000 blanks or non-blanks."""
    for at in range(0, len(text), MAX_ENCODE_CHARS):
        part = text[at : at + MAX_ENCODE_CHARS]
        start = 0
        for run in LONG_RUN.finditer(part):
            for cut in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS):
                yield part[start:cut]
                start = cut
        yield part[start:]


def _well_formed(text: str) -> str:
    """Return valid Unicode: surrogate pairs are joined, lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_bpe(tokens: Sequence[bytes], path: Path) -> tokenizers.Tokenizer:
    """Build the BPE of the tokens in a tiktoken file."""
    digest = hashlib.sha256(read_regular_file(path)).hexdigest()
    return vocabulary.build(tokens, cached_splits(tokens, digest))


def _special_tokens(tokens: Sequence[bytes], added: Mapping[int, str], path: Path) -> dict[str, int]:
    """Return the ids of the special tokens that follow the ordinary ones, by their texts."""
    size = len(tokens) + NUM_RESERVED_SPECIAL_TOKENS
    outside = next((i for i in added if not len(tokens) <= i < size), None)
    if outside is not None:
        raise TextError(
            f"added token `{added[outside]}` has id {outside}, outside {len(tokens)} to {size - 1}",
            hint=f"`{path.name}` and the other tokenizer files are from different checkpoints: take all from one",
        )
    special = {added.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(tokens), size)}
    if len(special) != NUM_RESERVED_SPECIAL_TOKENS:
        raise TextError(f"two added tokens for `{path}` have the same text")
    return special


def _added_tokens(folder: Path) -> dict[int, str]:
    """Return the tokens in `added_tokens_decoder` of `tokenizer_config.json`, else in `added_tokens.json`, by id."""
    path, plain_path = folder / "tokenizer_config.json", folder / "added_tokens.json"
    decoder: Any = read_json(path).get("added_tokens_decoder")
    if decoder:
        return _token_table(path, lambda: {int(i): str(token["content"]) for i, token in decoder.items()})
    return _token_table(plain_path, lambda: {int(i): text for text, i in read_json(plain_path).items()})


def _listed_tokens(path: Path) -> dict[int, str]:
    """Return the tokens in `added_tokens` of a `tokenizer.json` by id: transformers 5 writes them nowhere else."""
    listed: Any = read_json(path).get("added_tokens") or []
    return _token_table(path, lambda: {int(token["id"]): str(token["content"]) for token in listed})


def _token_table(path: Path, read: Callable[[], dict[int, str]]) -> dict[int, str]:
    """Return the table that `read` returns; raise TextError if the file has another form."""
    try:
        return read()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TextError(f"`{path}`: the added tokens are not a table of ids and tokens") from error


def _eos_token_ids(folder: Path) -> set[int]:
    """Return the ids in `eos_token_id` of the configuration files."""
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    configs: list[Any] = [config, text_config, read_json(folder / "generation_config.json")]
    ids: set[int] = set()
    for values in configs:
        value = cast("dict[str, Any]", values).get("eos_token_id") if isinstance(values, dict) else None
        listed = cast("list[Any]", value) if isinstance(value, list) else [value]
        ids.update(i for i in listed if isinstance(i, int))
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file.

    Raises:
        TextError: the file cannot be read, or is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(read_regular_file(path))
    except OSError as error:
        raise TextError(f"`{path}` cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TextError(f"`{path}` is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TextError(f"`{path}` does not hold an object")
    return cast("dict[str, Any]", value)
