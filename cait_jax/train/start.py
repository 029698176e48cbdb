"""Where a run starts, and whom it learns from.

The precedence: a checkpoint of the run itself, then `init.weights`, then `init.pretrained`, then initialisation
from the seed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cait_jax.errors import Literal, UserError, setting, some
from cait_jax.evaluation.labels import LabelError, match_classes
from cait_jax.models.cait import CaiT
from cait_jax.train.distill import make_teacher, read_logits, recorded_class_names


def given_params(config: ConfigDict, model: CaiT) -> Any:
    """The parameters that a run is to start from, where its config names some.

    Args:
      config: `init.weights` is a file, a saved directory or another run's workdir; `init.pretrained` stands
        for the released weights of `model.name`; `init.reset_head` starts the head anew.
      model: the run's model; positions and patch kernel are resized to it.

    Returns:
      The `params` tree, on the host; None where the run starts from its seed.

    Raises:
      UserError: the weights cannot be had or do not fit, or both keys are given.
    """
    from cait_jax.weights.pretrained import load_pretrained

    init = config.init
    if init.weights is None and not init.pretrained:
        if init.reset_head or init.ema:
            raise UserError(
                f"{setting('config.init.reset_head')} and {setting('config.init.ema')} go with "
                f"{setting('config.init.weights', Literal('PATH'))} or "
                f"{setting('config.init.pretrained', True)}: give one of these, or leave them out"
            )
        return None
    if init.weights is not None and init.pretrained:
        raise UserError(
            f"{setting('config.init.weights')} and {setting('config.init.pretrained')} both say where to "
            "start: give one"
        )
    loaded, variables = load_pretrained(
        config.model.name,
        weights=init.weights,
        image_size=model.image_size,
        num_classes=model.num_classes,
        in_channels=model.in_channels,
        reset_head=init.reset_head,
        ema=init.ema,
        seed=config.seed,
        **{key: value for key, value in config.model.items() if key != "name"},
    )
    assert loaded == model
    return variables["params"]


def given_teacher(config: ConfigDict, model: CaiT) -> Any:
    """The teacher that a config names, ready to see the student's images.

    Args:
      config: `distill.teacher` is a released name or a directory, `distill.weights` a file for a name.
      model: the student.

    Returns:
      A teacher of `make_teacher` in bfloat16; None where `distill.kind` is `"none"`, or its logits are
        recorded.

    Raises:
      UserError: its weights cannot be had, or it knows other classes.
    """
    name, weights = config.distill.teacher, config.distill.weights
    if config.distill.kind == "none" or config.distill.logits is not None:
        return None
    from cait_jax.weights.pretrained import load_pretrained, preprocessing

    teacher, variables = load_pretrained(name, weights=weights)
    prepare = preprocessing(name)
    return make_teacher(
        teacher,
        variables,
        mean=prepare.mean,
        std=prepare.std,
        student_mean=config.data.mean,
        student_std=config.data.std,
        num_classes=model.num_classes,
    )


def check_teacher_classes(config: ConfigDict, class_names: Sequence[str]) -> None:
    """Refuses a teacher in a directory whose classes have names, and other ones or in another order.

    Args:
      config: `distill.teacher`.
      class_names: the student's classes in the order of its logits.

    Raises:
      UserError: see above.
    """
    name = config.distill.teacher
    if config.distill.kind == "none" or config.distill.logits is not None:
        return
    if name is None or not Path(name).is_dir():
        return
    from cait_jax.weights.pretrained import load_settings

    names = load_settings(name).label_names
    if names is None or len(names) != len(class_names):
        return
    try:
        same = np.array_equal(match_classes(class_names, names, len(names)), range(len(names)))
    except LabelError:
        same = False
    if not same:
        raise UserError(
            f"the teacher {name} knows the classes {some(names)} in this order, and the student learns "
            f"{some(class_names)}: choose a teacher of the same classes, or record its logits with cait "
            "evaluate --logits for --config.distill.logits"
        )


def given_logits(config: ConfigDict, examples: int, class_names: Sequence[str]) -> Any:
    """What a teacher said of each training image, where a config names a file of it.

    Args:
      config: `distill.logits`, see `cait_jax.train.distill.read_logits`.
      examples: images of the training split.
      class_names: the student's classes in the order of its logits. Logits whose file names their classes are
        brought to this order.

    Returns:
      The logits (examples, classes), or None.

    Raises:
      UserError: the file does not fit, or nothing is to be learnt from it.
    """
    path = config.distill.logits
    if path is None:
        return None
    if config.distill.kind == "none":
        raise UserError(
            f"{setting('config.distill.logits')} is given and nothing learns from it: set "
            f"{setting('config.distill.kind')} to hard or soft"
        )
    logits = read_logits(path, examples, len(class_names))
    names = recorded_class_names(path)
    if names is None:
        return logits
    try:
        columns = match_classes(class_names, names, len(names))
    except LabelError as error:
        raise UserError(
            f"the logits in {path} are of the classes {some(names)}, and the student learns "
            f"{some(class_names)}: record them with a teacher of the same classes"
        ) from error
    return logits if np.array_equal(columns, range(len(names))) else logits[:, columns]
