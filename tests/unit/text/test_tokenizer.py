"""Our tokenizer compared with the `tiktoken` package, and edge cases."""

# ruff: noqa: RUF001  (these characters are under test)
from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import TextError
from kimi_mlx.text.template import ChatTemplate
from kimi_mlx.text.tokenizer import MAX_ENCODE_CHARS, MAX_RUN_CHARS, Tokenizer, _split_long
from tests.unit.text.vocabularies import SPECIAL, reference, small_ranks, write_tokenizer

REFERENCE = reference(small_ranks())
FIRST_SPECIAL = len(small_ranks())

# Characters on which tokenizers differ: scripts, marks, letters with odd cases, white space of every kind, markers.
ODD = [
    *"aZ1 \n\r\t'’-_<>|[]{}\"\\",
    *["\u0085", "\u00a0", "\u180e", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", "\x1c", "\x00"],
    *["汉", "字", "〇", "々", "ー", "が", "한", "ᄒ", "\U00016ff0", "\U0001b122", "\u302a"],
    *["é", "e\u0301", "\u0301", "क", "ि", "ʰ", "ª", "ǅ", "ſ", "K", "ß", "ﬆ", "ŉ", "İ"],
    *["½", "Ⅷ", "٣", "👍🏽", "👩\u200d👩\u200d👧", "'s", "'LL", "'ſ", "'Re", "HTTPServer", "    ", "  \n"],
    *SPECIAL.values(),
]
TEXTS = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=4)), max_size=30).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@given(text=TEXTS)
def test_ids_equal_tiktoken(tokenizer: Tokenizer, text: str):
    assert tokenizer.encode(text) == REFERENCE.encode(text, disallowed_special=())


@given(text=TEXTS)
def test_decode_is_the_inverse_of_encode(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ids=st.lists(st.integers(0, FIRST_SPECIAL + 255), max_size=40))
def test_decode_and_detokenizer_equal_tiktoken(tokenizer: Tokenizer, ids: list[int]):
    detokenizer = tokenizer.detokenizer()
    streamed = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
    assert streamed == tokenizer.decode(ids) == REFERENCE.decode(ids)


@given(ids=st.lists(st.integers(0, 255), max_size=20))
def test_detokenizer_never_returns_half_a_character(tokenizer: Tokenizer, ids: list[int]):
    shown = bytes(ids).decode("utf-8", "replace")
    detokenizer = tokenizer.detokenizer()
    so_far = ""
    for token_id in ids:
        so_far += detokenizer.add(token_id)
        assert shown.startswith(so_far)


@pytest.mark.parametrize("marker", [*SPECIAL.values(), f"<|reserved_token_{FIRST_SPECIAL + 5}|>"])
def test_control_tokens_in_text_stay_text(tokenizer: Tokenizer, marker: str):
    ids = tokenizer.encode(f"a {marker} b")
    assert max(ids) < FIRST_SPECIAL
    assert tokenizer.special_tokens[marker] >= FIRST_SPECIAL


def test_special_tokens_and_sizes(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == FIRST_SPECIAL + 256 == len(small_ranks()) + len(tokenizer.special_tokens)
    assert tokenizer.special_tokens["<|im_end|>"] == FIRST_SPECIAL + 2
    assert tokenizer.special_tokens[f"<|reserved_token_{FIRST_SPECIAL + 5}|>"] == FIRST_SPECIAL + 5
    assert tokenizer.decode([FIRST_SPECIAL + 22, *tokenizer.encode("é")]) == "<think>é"


@pytest.mark.parametrize("token_id", [-1, FIRST_SPECIAL + 256, 10**12])
def test_unknown_id_is_a_text_error(tokenizer: Tokenizer, token_id: int):
    with pytest.raises(TextError, match=f"token id {token_id} is not in the vocabulary"):
        tokenizer.decode([0, token_id])
    with pytest.raises(TextError):
        tokenizer.detokenizer().add(token_id)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "\ude00\ud83d", "\ud83d" + "\ude00"])
def test_surrogates_are_replaced_as_in_tiktoken(tokenizer: Tokenizer, text: str):
    assert tokenizer.encode(text) == REFERENCE.encode(text, disallowed_special=())


def split_by_definition(text: str) -> list[str]:
    """Split text one character at a time, as the definition says."""
    chunks = [""]
    for at, char in enumerate(text):
        run = 0
        while at - run >= 0 and run < len(chunks[-1]) and text[at - run - 1].isspace() == char.isspace():
            run += 1
        if at % MAX_ENCODE_CHARS == 0 or run >= MAX_RUN_CHARS:
            chunks.append("")
        chunks[-1] += char
    return [chunk for chunk in chunks if chunk]


@given(runs=st.lists(st.tuples(st.sampled_from(["ab", " \x1c", "漢", "\u3000\n"]), st.integers(1, 9)), max_size=8))
def test_long_text_is_split_as_defined(runs: list[tuple[str, int]]):
    with pytest.MonkeyPatch.context() as patch:
        module = "kimi_mlx.text.tokenizer"
        patch.setattr(f"{module}.MAX_ENCODE_CHARS", 16)
        patch.setattr(f"{module}.MAX_RUN_CHARS", 5)
        patch.setattr(f"{module}.LONG_RUN", re.compile(r"\s{6,}|\S{6,}"))
        patch.setitem(globals(), "MAX_ENCODE_CHARS", 16)
        patch.setitem(globals(), "MAX_RUN_CHARS", 5)
        text = "".join(unit * count for unit, count in runs)
        assert [chunk for chunk in _split_long(text) if chunk] == split_by_definition(text)


def test_a_million_blanks_are_encoded_quickly(tokenizer: Tokenizer):
    text = " " * 1_000_000
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 10
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("unit", ["a", "A", "漢", "\u0301", " \n", "=-", "7"])
def test_long_monotonous_text_equals_tiktoken(tokenizer: Tokenizer, unit: str):
    text = unit * (MAX_RUN_CHARS // len(unit))
    assert tokenizer.encode(text) == REFERENCE.encode(text)


def test_end_tokens_come_from_all_files(tmp_path: Path):
    folder = write_tokenizer(tmp_path)
    (folder / "config.json").write_text('{"eos_token_id": 7, "text_config": {"eos_token_id": null}}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    ends = Tokenizer.load(folder).eos_token_ids
    assert ends == {7, 8, 9, FIRST_SPECIAL + 1, FIRST_SPECIAL + 2}


def test_empty_folder_is_a_text_error(tmp_path: Path):
    with pytest.raises(TextError, match=r"neither `tiktoken\.model` nor `tokenizer\.json`"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"3": {"content": "<x>"}}, "`<x>` has id 3, outside"),
        ({str(FIRST_SPECIAL + 256): {"content": "<x>"}}, "outside"),
        ({str(FIRST_SPECIAL + i): {"content": "<x>"} for i in (0, 1)}, "same text"),
        ({"x": {"content": "<x>"}}, "not a table"),
        ({"3": "<x>"}, "not a table"),
        (["<x>"], "not a table"),
    ],
)
def test_wrong_added_tokens_are_text_errors(tmp_path: Path, added: object, message: str):
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(TextError, match=message):
        Tokenizer.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_broken_configuration_is_a_text_error(tmp_path: Path, text: str):
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TextError, match=r"tokenizer_config\.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tiktoken.model", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_a_file_is_an_error_and_does_not_block(tmp_path: Path, name: str):
    folder = write_tokenizer(tmp_path)
    if name == "tokenizer.json":
        (folder / "tiktoken.model").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    load = ChatTemplate.load if name == "chat_template.jinja" else Tokenizer.load
    with pytest.raises(TextError, match="a pipe"):
        load(folder)
