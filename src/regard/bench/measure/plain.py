"""Results as JSON that any reader accepts."""

from __future__ import annotations

import json
import math
from typing import Any


def as_json(value: Any) -> str:
    """Indented JSON; numbers that are not finite become null.

    >>> print(as_json({"ms": (1.5, float("nan"))}))
    {
     "ms": [
      1.5,
      null
     ]
    }
    """
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
