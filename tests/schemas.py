"""Random JSON schemas, and random answers that satisfy a grammar."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.engine.grammar_compiler import GrammarCompiler
from kimi_mlx.text.tokenizer import Tokenizer

Schema = dict[str, Any]

NAMES = ("name", "age", "a b", "naïve", "日本", "tab\there", 'quo"te', "back\\slash", "/", "x-1", "type", "$ref", "")
STRINGS = ("red", "", "long " * 9, "é\n", '"', "\\", "👍🏽", "\x01", "</think>", "<|im_end|>")
PATTERNS = ("^[a-z]{2,5}$", "ab+c", "^(\\d{3}-)?\\d{4}$", "^[^x]*$", "^\\w+@\\w+\\.com$", "[À-ÿ]$", "^$|^0x[0-9a-f]+$")
FORMATS = ("date", "time", "date-time", "duration", "ipv4", "ipv6", "uuid", "email", "hostname", "uri", "made-up")
KEYWORDS = (
    *("type", "properties", "items", "enum", "const", "required", "$ref", "$defs", "anyOf", "oneOf", "allOf", "not"),
    *(
        "description",
        "default",
        "title",
        "format",
        "pattern",
        "minimum",
        "maximum",
        "minLength",
        "maxItems",
        "examples",
    ),
    *("additionalProperties", "patternProperties", "prefixItems", "exclusiveMinimum", "multipleOf", "minProperties"),
)
NUMBERS = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([10**400, -(10**400)])
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=6),
    st.sampled_from(
        ["string", "object", "array", "null", "integer", "#", "#/$defs/a", "#/properties/a", "a", "]]>\n//"]
    ),
)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.sampled_from(KEYWORDS), st.sampled_from("ab"), st.text(max_size=4)), inner, max_size=4
        ),
    ),
    max_leaves=12,
)
ANY_OBJECT = st.dictionaries(st.one_of(st.sampled_from(KEYWORDS), st.text(max_size=4)), ANY_JSON, max_size=5)
"""Any JSON in the place of a schema, often with a schema's keywords and values in the wrong places."""


def random_schema(rng: random.Random, depth: int = 3) -> Schema | bool:
    """Return a random supported schema, which may be one that nothing satisfies."""
    definitions = {name: _schema(rng, 1, ()) for name in ("D0", "D1")} if rng.random() < 0.3 else {}
    if definitions and rng.random() < 0.5:
        tree = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
        definitions["tree"] = {"anyOf": [{"type": "null"}, tree], "title": "a tree"}
    schema = _schema(rng, depth, tuple(definitions))
    if definitions and isinstance(schema, dict):
        schema["$defs"] = definitions
    return schema


def _schema(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Any:
    kinds = [_string, _integer, _number, _plain, _enum]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _any_of, _one_of, _all_of, _several_types]
    if definitions:
        kinds += [lambda rng, depth, definitions: {"$ref": f"#/$defs/{rng.choice(definitions)}"}] * 3
    schema = rng.choice(kinds)(rng, depth, definitions)
    if isinstance(schema, dict) and rng.random() < 0.3:
        schema |= {"description": "words", "default": None, "x-unknown": {"not": 1}, "examples": [1]}
    return schema


def _plain(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Any:
    return rng.choice([{"type": "null"}, {"type": "boolean"}, {}, True, {"type": "string"}, {"type": "object"}])


def _string(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    schema: Schema = {"type": "string"}
    kind = rng.randrange(4)
    if kind == 0:
        schema["pattern"] = rng.choice(PATTERNS)
    elif kind == 1:
        schema["format"] = rng.choice(FORMATS)
    if kind in (0, 2):
        low = rng.randrange(6)
        schema |= rng.choice([{"minLength": low}, {"maxLength": low + 8}, {"minLength": low, "maxLength": low + 8}])
    return schema


def _integer(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    schema: Schema = {"type": "integer"}
    low = rng.choice([-(2**63), -1000, -1, 0, 7, 10**15, 2**53 + 1])
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = rng.choice([low + 3, low + 500, 2**64])
    if rng.random() < 0.2:
        schema["multipleOf"] = rng.choice([1, 2, 3, 5, 10, 64])
    return schema


def _number(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    schema: Schema = {"type": "number"}
    low = rng.choice([-1e10, -3.75, -0.001, 0, 0.1, 2.5, 1e-7])
    if rng.random() < 0.7:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.7:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = rng.choice([low + 0.5, low + 1000, 1e12])
    return schema


def _enum(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    values = [*STRINGS, 0, -7, 3.5, 10**12, 1e100, True, None, [], {}, [1, ["x"]], {"k": {"v": [None]}}]
    chosen = rng.sample(values, rng.randrange(1, 5))
    return {"const": chosen[0]} if rng.random() < 0.3 else {"enum": chosen}


def _object(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    names = rng.sample(NAMES, rng.randrange(5))
    properties = {name: _schema(rng, depth - 1, definitions) for name in names}
    schema: Schema = {"type": "object", "properties": properties}
    if rng.random() < 0.7:
        schema["required"] = [name for name in names if rng.random() < 0.6]
    if rng.random() < 0.6:
        schema["additionalProperties"] = rng.choice([False, False, True, _schema(rng, 0, definitions)])
    if rng.random() < 0.15:
        schema["patternProperties"] = {"^p[0-9]+$": _schema(rng, 0, definitions), "^q": False}
    if rng.random() < 0.2:
        schema[rng.choice(["minProperties", "maxProperties"])] = rng.randrange(1, 5)
    return schema


def _array(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    schema: Schema = {"type": "array", "items": _schema(rng, depth - 1, definitions)}
    if rng.random() < 0.2:
        schema["prefixItems"] = [_schema(rng, depth - 1, definitions) for _ in range(2)]
        schema["items"] = rng.choice([False, schema["items"]])
    low = rng.randrange(3)
    return schema | rng.choice([{"minItems": low}, {"maxItems": low + 1}, {"minItems": low, "maxItems": low + 2}])


def _any_of(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    return {"anyOf": [_schema(rng, depth - 1, definitions) for _ in range(rng.randrange(1, 4))]}


def _one_of(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    """Return a union with a discriminator field, as pydantic writes it."""

    def alternative(kind: str) -> Schema:
        fields = {"kind": {"const": kind}, "value": _schema(rng, depth - 1, definitions)}
        return {"type": "object", "properties": fields, "required": ["kind"]}

    return {"oneOf": [alternative(kind) for kind in ("cat", "dog", "")]}


def _all_of(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    return {"allOf": [_object(rng, depth - 1 if depth > 1 else 1, definitions) for _ in range(2)]}


def _several_types(rng: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    types = rng.sample(["null", "boolean", "integer", "number", "string", "array", "object"], 2)
    return {"type": types, "minLength": 2, "minimum": -5, "items": {"type": "null"}, "properties": {"a": {}}}


def random_answer(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, seed: int, max_tokens: int = 400
) -> list[int] | None:
    """Sample tokens that the grammar allows, with a growing bias towards the end; None if there is no end in time.

    Args:
        compiler: compiler for the vocabulary of the tokenizer.
        tokenizer: tokenizer of the model.
        grammar: grammar of the answer.
        seed: seed of the random numbers.
        max_tokens: limit on the tokens of the answer.
    """
    rng, closes = np.random.default_rng(seed), _closes(tokenizer)
    constraint = Constraint(compiler, grammar)
    answer: list[int] = []
    while len(answer) < max_tokens:
        allowed = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")[: len(closes)].astype(bool)
        assert allowed.any()
        logits = rng.gumbel(size=len(closes)) + closes * (len(answer) / 8)
        token = int(np.where(allowed, logits, -np.inf).argmax())
        constraint.advance(token)
        answer.append(token)
        if constraint.is_finished:
            return answer
    return None


@functools.cache
def _closes(tokenizer: Tokenizer) -> np.ndarray:
    """Return, for each token, whether it brings an answer closer to its end."""
    closes = [tokenizer.token_bytes(i)[:1] in (b'"', b"]", b"}", b"0") for i in range(tokenizer.vocab_size)]
    special = {i for text, i in tokenizer.special_tokens.items() if "end" in text or "/" in text}
    return np.array([is_closing or i in special for i, is_closing in enumerate(closes)])
