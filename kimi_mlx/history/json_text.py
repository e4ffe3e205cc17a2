"""JSON text that SQLite and every terminal can store."""

from __future__ import annotations

import json
from typing import Any

ENCODER = json.JSONEncoder(ensure_ascii=False)
"""`json.dumps` makes a new encoder for each call, which takes as long as the rest."""


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON. Characters beyond ASCII are escaped only if one is a lone surrogate, which UTF-8 cannot encode."""
    text = ENCODER.encode(value) if indent is None else json.dumps(value, ensure_ascii=False, indent=indent)
    return json.dumps(value, indent=indent) if has_surrogates(text) else text


def has_surrogates(text: str) -> bool:
    """Return whether a text has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
