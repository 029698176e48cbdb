"""Where a run starts, and whom it learns from.

The precedence: a checkpoint of the run itself, then `init.weights`, then `init.pretrained`, then initialisation
from the seed.
"""

from typing import Any

from ml_collections import ConfigDict

from cait_jax.errors import UserError
from cait_jax.interface import Literal, setting
from cait_jax.models.cait import CaiT
from cait_jax.train.distill import make_teacher, read_logits


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
    from cait_jax.weights.names import preprocessing
    from cait_jax.weights.pretrained import load_pretrained

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


def given_logits(config: ConfigDict, examples: int, num_classes: int) -> Any:
    """What a teacher said of each training image, where a config names a file of it.

    Args:
      config: `distill.logits`, see `cait_jax.train.distill.read_logits`.
      examples: images of the training split.
      num_classes: of the student.

    Returns:
      The logits (examples, num_classes), or None.

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
    return read_logits(path, examples, num_classes)
