"""Weights that are numbers: what every loader and every writer of weights goes through."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cait_jax.errors import UserError

_NUMBERS_AT_ONCE = 2**22


def check_finite(weights: Mapping[str, Any], dtype: Any = None) -> None:
    """Refuses weights with NaN or infinity among them.

    Args:
      weights: name to array; integers are always finite.
      dtype: what they will be cast to, if that may overflow.

    Raises:
      UserError: naming the first such weight, how many of its numbers are not finite, and how many weights are
        affected.
    """
    bad = {name: count for name, array in weights.items() if (count := _not_finite(array, None))}
    if bad:
        name, count = next(iter(bad.items()))
        more = f", and so have {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{name} has {count:,} of {np.size(weights[name]):,} numbers that are NaN or infinite{more}: the run "
            "that wrote these weights diverged, or the file is damaged; take an earlier checkpoint"
        )
    if dtype is None:
        return
    for name, array in weights.items():
        if count := _not_finite(array, dtype):
            raise UserError(
                f"{name} has {count:,} numbers that {np.dtype(dtype).name} cannot hold: keep a wider dtype"
            )


def _not_finite(array: Any, dtype: Any) -> int:
    """How many numbers are not finite, after a cast to `dtype`."""
    array = np.asarray(array)
    if array.dtype.kind in "biuSU":
        return 0
    flat, count = array.reshape(-1), 0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, _NUMBERS_AT_ONCE):
            part = flat[start : start + _NUMBERS_AT_ONCE]
            part = part if dtype is None else part.astype(dtype)
            count += part.size - int(np.count_nonzero(np.isfinite(part)))
    return count
