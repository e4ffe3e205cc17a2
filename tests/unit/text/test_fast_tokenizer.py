"""Tokenizers from `tokenizer.json`: the same ids and guarantees as from `tiktoken.model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from kimi_mlx.errors import TextError
from kimi_mlx.text.tokenizer import Tokenizer
from kimi_mlx.text.vocabulary import build, find_splits
from tests.unit.text.vocabularies import SPECIAL, reference, small_ranks

FIRST_SPECIAL = len(small_ranks())
REFERENCE = reference(small_ranks())


def write_fast_tokenizer(folder: Path) -> dict[str, Any]:
    """Write the small vocabulary, control tokens included, as Hugging Face would; return it."""
    bpe = build(small_ranks(), find_splits(small_ranks()))
    bpe.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL.values()])
    spec = json.loads(bpe.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return spec


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("fast")
    write_fast_tokenizer(folder)
    return Tokenizer.load(folder)


@given(text=st.lists(st.one_of(st.sampled_from([*SPECIAL.values(), " ", "汉字"]), st.text(max_size=5))).map("".join))
def test_ids_equal_tiktoken_and_control_tokens_stay_text(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert ids == REFERENCE.encode(text, disallowed_special=())
    assert tokenizer.decode(ids) == text


def test_control_tokens_keep_their_ids(tokenizer: Tokenizer):
    assert tokenizer.special_tokens == {text: FIRST_SPECIAL + i for i, text in enumerate(SPECIAL.values())}
    end = tokenizer.special_tokens["<|im_end|>"]
    assert end in tokenizer.eos_token_ids
    assert tokenizer.decode([end]) == "<|im_end|>"
    with pytest.raises(TextError):
        tokenizer.decode([tokenizer.vocab_size])


def test_control_tokens_in_the_model_are_removed(tmp_path: Path):
    spec = write_fast_tokenizer(tmp_path)
    for token in spec["added_tokens"]:
        spec["model"]["vocab"][token["content"]] = token["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loaded = Tokenizer.load(tmp_path)
    assert max(loaded.encode("".join(SPECIAL.values()))) < FIRST_SPECIAL


def test_merges_written_as_strings(tmp_path: Path, tokenizer: Tokenizer):
    spec = write_fast_tokenizer(tmp_path)
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    text = "def encode(self): the quick brown fox 你好"
    assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model",), None, "cannot read"),
        (("model", "vocab"), [], "cannot read"),
        (("model", "vocab"), {"a": "x"}, "cannot read"),
        (("model", "type"), "Nonsense", "cannot build"),
        (("model", "vocab"), {"▁a": 0}, "not byte-level"),
        (("pre_tokenizer",), {"type": "Nonsense"}, "cannot build"),
        (("added_tokens",), [{"content": "x"}], "cannot read"),
    ],
)
def test_broken_files_are_text_errors(tmp_path: Path, path: tuple[str, ...], value: Any, message: str):
    spec = write_fast_tokenizer(tmp_path)
    target = spec
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TextError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_invalid_json_is_a_text_error(tmp_path: Path, text: str):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TextError, match="cannot read"):
        Tokenizer.load(tmp_path)
