"""JSON text that SQLite and every terminal can store."""

from __future__ import annotations

import json
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON. Characters beyond ASCII are escaped only if one is a lone surrogate, which UTF-8 cannot encode."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return json.dumps(value, indent=indent) if has_surrogates(text) else text


def has_surrogates(text: str) -> bool:
    """Return whether a text has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
