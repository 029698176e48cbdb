"""Evaluation images with label and prediction, drawn at every evaluation: WORKDIR/predictions/step_N.png."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cait_jax.augment.pipeline import normalise
from cait_jax.data.decode import center_crop
from cait_jax.data.show import draw_sheet, spread
from cait_jax.data.split import InMemory, Split, read_record
from cait_jax.errors import StorageError
from cait_jax.evaluation.labels import class_words
from cait_jax.files import atomic_replace
from cait_jax.sharding import replicated
from cait_jax.train.metrics import MetricWriter
from cait_jax.train.setup import Trainer

_RIGHT, _WRONG, _UNLABELLED = "darkgreen", "firebrick", "black"


def prediction_recorder(
    trainer: Trainer, writer: MetricWriter, workdir: Path
) -> Callable[[int, Mapping[str, Any]], None]:
    """A function of a step and its named parameters that draws what they predict; of the EMA where there is one.

    `report.predictions` images, evenly spread over the evaluation split, are the same at every evaluation. Below
    each is the predicted class with its probability in percent and, where it is wrong, the label. A picture
    depends on the step alone: a resumed run writes the same again.

    Raises:
      StorageError: by the function: a picture cannot be written.
    """
    config, split = trainer.config, trainer.eval_split
    chosen = spread(len(split), config.report.predictions)
    images, labels = _examples(split, chosen, trainer)
    names = class_words(trainer.train_split.class_names)

    def predict(params: Any, images: Array) -> Float[Array, "images classes"]:
        pixels = normalise(images, config.data.mean, config.data.std)
        logits: Any = trainer.model.apply({"params": params}, pixels)
        return jax.nn.softmax(logits.astype(jnp.float32))

    predict = jax.jit(predict, out_shardings=replicated(trainer.mesh))

    def draw(step: int, named: Mapping[str, Any]) -> None:
        probabilities = np.asarray(predict(named.get("ema_", named[""]), jnp.asarray(images)))
        if jax.process_index() != 0:
            return
        captions = [
            _caption(row, label, names) for row, label in zip(probabilities, labels, strict=True)
        ]
        sheet = draw_sheet(list(images), captions)
        path = workdir / "predictions" / f"step_{step}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_replace(path) as temporary:
                sheet.save(temporary, format="PNG")
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error.strerror}; free some space or set report.predictions to 0"
            ) from error
        writer.picture(step, "eval/predictions", np.asarray(sheet))

    return draw


def _caption(
    probabilities: Float[np.ndarray, " classes"], label: int, names: Sequence[str]
) -> tuple[str, str]:
    best = int(probabilities.argmax())
    words = f"{names[best]} {probabilities[best]:.0%}"
    if label < 0:
        return words, _UNLABELLED
    return (words, _RIGHT) if best == label else (f"{words}, is {names[label]}", _WRONG)


def _examples(
    split: Split, chosen: list[int], trainer: Trainer
) -> tuple[UInt8[np.ndarray, "images h w c"], list[int]]:
    if isinstance(split, InMemory):
        return split.images[chosen], [int(label) for label in split.labels[chosen]]
    records = [read_record(split, index) for index in chosen]
    crops = [
        center_crop(
            record["image"],
            image_size=trainer.model.image_size,
            crop_pct=trainer.config.eval.crop_pct,
            channels=split.channels,
            exif=split.exif,
        )
        for record in records
    ]
    return np.stack(crops), [int(np.asarray(record["label"])) for record in records]
