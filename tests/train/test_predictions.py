"""Pictures of what is predicted of evaluation images: right words, right place, the same after a resume."""

import jax
import numpy as np
import pytest
from PIL import Image

from cait_jax.data.in_memory import load_digits
from cait_jax.data.show import spread
from cait_jax.errors import UserError
from cait_jax.train import predictions, train
from cait_jax.train.config import load_config


@pytest.fixture
def config():
    config = load_config("configs/digits.py")
    config.steps, config.batch_size = 8, 64
    config.eval.every_epochs = 4 * 64 / 1437
    config.checkpoint.every_steps = 4
    config.report.predictions = 10
    config.optimizer.ema_decay = 0.5
    return config


def size_of(file):
    with Image.open(file) as picture:
        return picture.size


@pytest.mark.slow
def test_pictures_are_of_the_evaluated_state(config, tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr(
        predictions,
        "draw_sheet",
        lambda pictures, texts, draw=predictions.draw_sheet: (
            captions.append((np.stack(pictures), texts)) or draw(pictures, texts)
        ),
    )
    run = train(config, tmp_path / "run")
    files = sorted((tmp_path / "run" / "predictions").iterdir())
    assert [file.name for file in files] == ["step_4.png", "step_8.png"]
    assert size_of(files[0]) == (8 * 128, 2 * (128 + 16))

    split = load_digits("test", (8, 8))
    chosen = spread(len(split), 10)
    shown, texts = captions[-1]
    np.testing.assert_array_equal(shown, split.images[chosen])
    pixels = (split.images[chosen] / 255 - 0.5) / 0.5
    expected = jax.nn.softmax(run.model.apply({"params": run.state.ema}, pixels.astype(np.float32)))
    for row, label, (words, colour) in zip(expected, split.labels[chosen], texts, strict=True):
        best = int(row.argmax())
        assert words.startswith(f"{best} {row[best]:.0%}")
        assert words.endswith(f", is {label}") == (best != label)
        assert colour == ("darkgreen" if best == label else "firebrick")

    config.steps = 4
    half = tmp_path / "half"
    train(config, half)
    assert (half / "predictions" / "step_4.png").read_bytes() == files[0].read_bytes()


@pytest.mark.slow
def test_photographs_are_drawn_as_they_are_evaluated(config, tmp_path):
    rng = np.random.default_rng(0)
    for side, count in (("train", 8), ("val", 3)):
        for name in ("a", "b"):
            folder = tmp_path / "photographs" / side / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    config.data.update(name=str(tmp_path / "photographs"), train_split="train", eval_split="val")
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.batch_size, config.steps, config.eval.batch_size = 8, 2, 8
    config.eval.every_epochs = 9.0
    train(config, tmp_path / "run")
    (file,) = (tmp_path / "run" / "predictions").iterdir()
    assert size_of(file) == (6 * 128, 128 + 16)


def test_they_need_labels(config, tmp_path):
    config.objective = "mae"
    with pytest.raises(UserError, match=r"report.predictions is for classifiers: set it to 0"):
        train(config, tmp_path)
