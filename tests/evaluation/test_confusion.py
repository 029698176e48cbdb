import sys

import numpy as np
import pytest
from PIL import Image

from cait_jax import UserError
from cait_jax.evaluation import save_confusion

MATRIX = np.array([[9, 1, 0], [0, 0, 0], [5, 0, 5]])


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.text == {}  # no version, no date
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_same_matrix_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_confusion(MATRIX, ("cat", "dog", "great_white_shark"), tmp_path / name, "three")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_rows_are_true_classes_and_a_darker_cell_has_more_of_its_row(tmp_path):
    save_confusion(MATRIX, ("", "", ""), tmp_path / "c.png")
    image = pixels_of(tmp_path / "c.png")
    cell = 100
    left, top = 80, image.shape[0] - 80 - 3 * cell
    corners = image[top + 10 : top + 300 : cell, left + 10 : left + 300 : cell].sum(-1)
    assert corners[0, 0] < corners[2, 0] == corners[2, 2] < corners[0, 1] < corners[0, 2]
    np.testing.assert_array_equal(corners[1], corners[0, 2])  # no images


def test_every_cell_of_a_thousand_classes_has_its_pixel(tmp_path):
    # One mistake in fifty a class, all in places apart.
    matrix = 49 * np.eye(1000, dtype=int)
    matrix[np.arange(1000), (7 * np.arange(1000) + 300) % 1000] += 1
    save_confusion(matrix, ["name"] * 1000, tmp_path / "d.png")
    image = pixels_of(tmp_path / "d.png")
    inside = image[20:1020, 80:1080].sum(-1)
    background = np.median(inside)
    marked = inside < background - 60
    overlap = marked[1:-1, 1:-1] == (matrix > 0)[1:-1, 1:-1]
    assert overlap.all()


def test_the_callers_figures_are_left_alone(tmp_path):
    import matplotlib
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams)
    save_confusion(MATRIX, ("a", "b", "c"), tmp_path / "e.png")
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs


def test_mistakes_leave_nothing_behind(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be written: No such file"):
        save_confusion(MATRIX, "abc", tmp_path / "missing" / "f.png")
    (tmp_path / "g.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save_confusion(MATRIX, "abc", tmp_path / "g.png")
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "cait-jax\[figures\]"'):
        save_confusion(MATRIX, "abc", tmp_path / "h.png")
