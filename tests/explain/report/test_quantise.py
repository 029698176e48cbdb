import base64
import zlib

import numpy as np
import pytest

from cait_jax.errors import UserError
from cait_jax.explain.report.quantise import encode, quantise

ROWS = {
    "weights": lambda rng: rng.dirichlet(np.full(50, 0.05), (3, 20)),
    "nearly equal": lambda rng: 1 / 197 + 1e-7 * rng.normal(size=(3, 20, 50)),
    "of both signs": lambda rng: rng.normal(size=(3, 20, 50)) * 10.0 ** rng.integers(-9, 9, (3, 20, 1)),
    "all the same": lambda rng: np.full((2, 5), -0.125),
    "tiny": lambda rng: 1e-38 * rng.random((4, 50)),
    "one value": lambda rng: rng.normal(size=(4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("levels", [256, 64])
@pytest.mark.parametrize("rows", ROWS)
def test_stored_values_lie_within_half_a_step(rows, levels):
    array = ROWS[rows](np.random.default_rng(0)).astype(np.float32)
    found = quantise(array, levels)
    assert found.levels.max() < levels
    error = np.abs(found.values() - array)
    assert (error <= found.step[..., None].astype(np.float64) / 2 * (1 + 1e-9)).all()


def test_steps_are_no_larger_than_the_range_asks_for():
    array = np.random.default_rng(1).normal(size=(7, 30)).astype(np.float32)
    width = array.max(-1) - array.min(-1)
    np.testing.assert_allclose(quantise(array).step, width / 255, rtol=1e-6)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        quantise(np.array([[0.0, np.nan]]))


def test_the_encoding_is_offsets_and_steps_and_levels_in_order():
    rng = np.random.default_rng(2)
    parts = [quantise(rng.normal(size=(2, 3, 4))), quantise(rng.normal(size=(1, 9)))]
    content = zlib.decompress(base64.b64decode(encode(parts)))
    floats, levels = content[: 8 * 7], content[8 * 7 :]
    assert len(levels) == 24 + 9
    expected = [*(p.offset for p in parts), *(p.step for p in parts)]
    np.testing.assert_array_equal(
        np.frombuffer(floats, "<f4"), np.concatenate([part.ravel() for part in expected])
    )
    assert levels == b"".join(part.levels.tobytes() for part in parts)
