"""Check values of `config.json`: types, ranges, and missing fields."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from kimi_mlx.errors import ConfigError

INVALID_HINT = "fetch this file again, or use another checkpoint: `kimi-mlx models` lists them"
"""Hint for a field that is missing or invalid."""


class ValueRange(NamedTuple):
    """Values that a numeric field may have: from `low` (or above it) to `high`, or one of `choices`."""

    low: float = 1
    high: float = 2**40
    is_above: bool = False
    choices: tuple[int, ...] = ()

    def contains(self, value: float) -> bool:
        """Return whether `value` is in the range; NaN never is."""
        if self.choices:
            return value in self.choices
        return self.low <= value <= self.high and not (self.is_above and value == self.low)

    def __str__(self) -> str:
        if self.choices:
            return f"among {', '.join(map(str, self.choices))}"
        return f"{'above' if self.is_above else 'from'} {self.low} to {self.high}"


_POSITIVE = ValueRange(1e-6)  # far below every sensible value, and logarithms and quotients stay finite

VALUE_RANGES = {
    "num_hidden_layers": ValueRange(1, 1_000),
    "n_routed_experts": ValueRange(1, 100_000),
    "num_experts_per_tok": ValueRange(1, 100_000),
    "n_shared_experts": ValueRange(0, 100_000),
    "first_k_dense_replace": ValueRange(0),
    "rms_norm_eps": ValueRange(0, 1, is_above=True),
    "rope_theta": ValueRange(1, is_above=True),
    "routed_scaling_factor": _POSITIVE,
    "vt_num_hidden_layers": ValueRange(1, 1_000),
    "media_placeholder_token_id": ValueRange(0),
    "patch_size": ValueRange(1, 1_000),
    "projector_ln_eps": ValueRange(0, 1, is_above=True),
    "factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": ValueRange(0),
    "mscale_all_dim": ValueRange(0),
    "bits": ValueRange(choices=(2, 3, 4, 5, 6, 8)),
    "group_size": ValueRange(choices=(32, 64, 128)),
}
"""Ranges of fields of ModelConfig, VisionConfig, YarnScaling and Quantization; of others it is `ValueRange()`."""

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}
_TYPES = {"int": int, "float": float, "bool": bool, "str": str}


def check_fields(target: type[Any], raw: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Check and convert the plain fields of a dataclass; null counts as absent.

    Args:
        target: dataclass whose annotations give the types, and whose defaults mark optional fields.
        raw: JSON object.
        where: name of the file, for messages.
        prefix: prefix of field names in messages, such as `rope_scaling.`.

    Raises:
        ConfigError: a missing field or an invalid value.
    """
    values: dict[str, Any] = {}
    missing: list[str] = []
    for item in fields(target):
        kind = str(item.type).removesuffix(" | None")
        if kind in _KINDS and raw.get(item.name) is not None:
            value_range = VALUE_RANGES.get(item.name, ValueRange())
            values[item.name] = check_value(raw[item.name], kind, value_range, where, prefix + item.name)
        elif item.default is MISSING and item.default_factory is MISSING:
            missing.append(f"`{prefix}{item.name}`")
    if missing:
        raise ConfigError(f"`{where}` lacks {', '.join(sorted(missing))}", hint=INVALID_HINT)
    return values


def check_value(value: Any, kind: str, value_range: ValueRange, where: str, name: str) -> Any:
    """Return `value` converted to the type of its kind.

    Raises:
        ConfigError: another type, or outside the range.
    """
    expected = _KINDS[kind]
    if kind in ("bool", "str"):
        is_valid = isinstance(value, _TYPES[kind])
    else:
        expected += f" {value_range}"
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_valid = is_number and value_range.contains(value) and (kind == "float" or value == int(value))
    if not is_valid:
        raise ConfigError(f"`{where}` has {name} = {reprlib.repr(value)}, not {expected}", hint=INVALID_HINT)
    return _TYPES[kind](value)


def first_given(*values: Any) -> Any:
    """Return the first value that is not null, or None."""
    return next((value for value in values if value is not None), None)


def get_object(raw: Mapping[str, Any], name: str, where: str, prefix: str = "") -> Mapping[str, Any]:
    """Return the JSON object at `name`, empty if absent or null; `prefix` precedes the name in messages."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{where}` has {prefix}{name} = {reprlib.repr(value)}, not an object", hint=INVALID_HINT)
    return value
