import importlib.util

import numpy as np
import pytest
from PIL import Image

from cait_jax import UserError
from cait_jax.explain.figures import confusion_matrix, save

MATRIX = np.array([[9, 1, 0], [0, 0, 0], [5, 0, 5]])
MARGIN, CELL = 120, 150  # pixels, of three classes without names


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert "Software" not in image.text  # no version
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_same_matrix_gives_the_same_bytes(tmp_path):
    names = ("cat", "dog", "great_white_shark")
    a, b = (
        save(confusion_matrix(MATRIX, names, title="3"), tmp_path / n) for n in ("a.png", "b.png")
    )
    assert a.read_bytes() == b.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_rows_are_true_classes_and_a_darker_cell_has_more_of_its_row(tmp_path):
    image = pixels_of(save(confusion_matrix(MATRIX, ("", "", "")), tmp_path / "c.png"))
    top = image.shape[0] - MARGIN - 3 * CELL
    inside = image[top + 15 : top + 3 * CELL : CELL, MARGIN + 15 : MARGIN + 3 * CELL : CELL].sum(-1)
    assert inside[0, 0] < inside[2, 0] == inside[2, 2] < inside[0, 1] < inside[0, 2]
    np.testing.assert_array_equal(inside[1], inside[0, 2])  # no images


def test_every_cell_of_a_thousand_classes_has_its_pixel(tmp_path):
    # One mistake in fifty a class, all in places apart.
    matrix = 49 * np.eye(1000, dtype=int)
    matrix[np.arange(1000), (7 * np.arange(1000) + 300) % 1000] += 1
    image = pixels_of(save(confusion_matrix(matrix, ["name"] * 1000), tmp_path / "d.png"))
    top = image.shape[0] - MARGIN - 1000
    inside = image[top : top + 1000, MARGIN : MARGIN + 1000].sum(-1)
    marked = inside < np.median(inside) - 60
    assert (marked[2:-2, 2:-2] == (matrix > 0)[2:-2, 2:-2]).all()


def test_the_callers_figures_are_left_alone(tmp_path):
    import matplotlib
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams)
    save(confusion_matrix(MATRIX, ("a", "b", "c")), tmp_path / "e.svg")
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs


def test_mistakes_leave_nothing_behind(tmp_path, monkeypatch):
    figure = confusion_matrix(MATRIX, "abc")
    with pytest.raises(UserError, match="cannot be written: No such file"):
        save(figure, tmp_path / "missing" / "f.png")
    (tmp_path / "g.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save(figure, tmp_path / "g.png")
    with pytest.raises(UserError, match=r"h\.gif must end in \.png, \.svg or \.pdf"):
        save(figure, tmp_path / "h.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "cait-jax\[figures\]"'):
        confusion_matrix(MATRIX, "abc")
