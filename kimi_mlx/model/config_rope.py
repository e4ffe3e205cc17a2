"""RoPE settings in `config.json`: theta and YaRN scaling."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimi_mlx.errors import ConfigError
from kimi_mlx.model.config_values import INVALID_HINT, check_fields, first_given, get_object


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (https://arxiv.org/abs/2309.00071), with DeepSeek's mscale rules."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's attention temperature, 0.1 * mscale * ln(factor) + 1 (DeepSeek-V3's published code)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def parse_rope(raw: Mapping[str, Any], where: str) -> tuple[Any, YarnScaling | None]:
    """Return rope_theta, unchecked, and YaRN from `rope_scaling` or from the `rope_parameters` of transformers 5."""
    new = get_object(raw, "rope_parameters", where)
    old = get_object(raw, "rope_scaling", where)
    name, scaling = ("rope_scaling", old) if old else ("rope_parameters", new)
    theta = first_given(raw.get("rope_theta"), new.get("rope_theta"), 10000.0)
    kind = first_given(scaling.get("type"), scaling.get("rope_type"), "default")
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ConfigError(
            f"`{where}` has rope scaling {reprlib.repr(kind)}; supported are `yarn` and none", hint=INVALID_HINT
        )
    return theta, YarnScaling(**check_fields(YarnScaling, scaling, where, f"{name}."))
