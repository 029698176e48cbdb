"""Values as strict JSON (RFC 8259) holds them, which has no NaN and no infinity."""

import math
from collections.abc import Mapping
from typing import Any


def json_values(value: Any) -> Any:
    """The same mappings, lists and values, with None for floats that are not finite."""
    if isinstance(value, Mapping):
        return {key: json_values(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
