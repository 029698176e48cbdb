"""Training runs as sources of models; they are only read.

`RUN` is a run's newest valid checkpoint, `RUN/checkpoints/STEP` the one of that step and no other; a run is read
also while it goes on.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cait_jax.errors import UserError, setting
from cait_jax.models.zoo import create_model
from cait_jax.renamed import current_config
from cait_jax.weights.saved import checked_state_dict

_CHECKPOINTS = "checkpoints"  # of a run


class Backbone(NamedTuple):
    """Where the checkpoints of an objective hold a network without a head.

    Attributes:
      part: of the saved state; None: the parameters, or their average.
      params: from that part to the network's parameters.
      name: in words.
      dropped: what else was trained, in words.
      network: from the model that was trained to the one whose features are learnt; None if there is none.
    """

    part: str | None
    params: Callable[[Any], dict[str, Any]]
    name: str
    dropped: str
    network: Callable[[Any], Any | None] = lambda model: model


def _mean_pooled(model: Any) -> Any | None:
    """Masked autoencoding trains the tokens of patches: their mean is the feature, and no class token is."""
    if model.class_token == "mean":
        return model
    if model.class_token != "class_attention":
        return None
    return model.clone(class_token="mean", class_depth=0, class_mlp_ratio=None)


class Checkpoint(NamedTuple):
    """What a run recorded with one of its checkpoints.

    Attributes:
      path: `RUN/checkpoints/STEP`, which stays the same while the run goes on.
      step: its number.
      config: of the run, with current keys.
      metrics: of the evaluation at this step, such as `eval/accuracy`; empty if there was none.
    """

    path: Path
    step: int
    config: dict[str, Any]
    metrics: dict[str, float]


_BACKBONES = {
    "dino": Backbone(
        "carried",
        lambda carried: dict(carried["teacher"]["backbone"]),
        "its teacher's backbone",
        "its projection head",
    ),
    "mae": Backbone(
        None,
        lambda params: {**params["encoder"], "norm": params["decoder"]["encoder_norm"]},
        "its encoder",
        "its decoder",
        _mean_pooled,
    ),
}


def backbone_of(objective: str) -> Backbone | None:
    """The backbone of an objective's checkpoints; None where they have none apart."""
    return _BACKBONES.get(objective)


def is_run(path: Path) -> bool:
    """Whether `path` is the directory of a training run, or of one of its checkpoints."""
    return path.is_dir() and (_is_step(path) or (path / _CHECKPOINTS).is_dir())


def read_run(path: Path, *, ema: bool = False) -> tuple[Any, dict[str, np.ndarray]]:
    """Reads a run's parameters, or their average, without the optimiser's state; of some objectives a `Backbone`.

    Adapters (`lora.rank`) are merged into the parameters that they adapt.

    Returns:
      The model as it was trained, and a state dict of timm's.

    Raises:
      UserError: there is no checkpoint, none that is valid, no average in it, or it is of no classifier.
    """
    backbone = backbone_of(_known_objective(path, run_objective(path)))
    part = backbone.part if backbone is not None else None
    if backbone is not None and part is not None and ema:
        raise UserError(
            f"the run in {path} learnt without labels, and {backbone.name} is taken, which is an average already: "
            f"leave out {setting('ema', True)}"
        )
    params, meta = _restore(path, part or ("ema" if ema else "params"))
    if backbone is not None:
        params = backbone.params(params)
    if (adapters := meta["config"].get("lora")) and adapters["rank"]:
        from cait_jax.models import lora

        base, _ = _restore(path, "carried")  # the same in every checkpoint
        params = lora.merge(lora.join(base["base"], params), adapters["alpha"])
    model = _model(path, meta, params)
    return model, checked_state_dict(model, {"params": params})


def run_objective(path: Path) -> str:
    """What a run learns, its `config.objective`; "supervised" where there is no checkpoint yet."""
    checkpoints, step = _open(path)
    if step is None and checkpoints.latest_step() is None:
        return "supervised"
    return _objective(checkpoints.meta(step))


def read_encoder(
    path: Path, *, ema: bool = False
) -> tuple[tuple[int, int], dict[str, Any], tuple[str, ...]]:
    """Reads the encoder of a run with `objective="mae"`, or its average.

    Returns:
      The run's (height, width) in pixels, the encoder's parameters, and the names of the run's other parts.

    Raises:
      UserError: there is no checkpoint, none that is valid, or no average in it.
    """
    params, meta = _restore(path, "ema" if ema else "params")
    encoder = params.pop("encoder")
    return _image_size(current_config(meta["config"])), encoder, tuple(params)


def run_model(path: Path) -> Any:
    """The model of a run; of its parameters none are read, but of an old run.

    Raises:
      UserError: there is no checkpoint, none that is valid, or it is of no classifier.
    """
    meta, params = _meta(path)
    return _model(path, meta, params)


def run_settings(path: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """A run's class names and the preprocessing of its evaluation.

    Raises:
      UserError: there is no checkpoint, or none that is valid.
    """
    meta, params = _meta(path)
    config = current_config(meta["config"])
    preprocessing = {
        "image_size": list(_image_size(config)),
        "crop_pct": config["eval"]["crop_pct"],
        "mean": list(config["data"]["mean"]),
        "std": list(config["data"]["std"]),
        "channels": _channels(meta, params),
    }
    return _class_names(meta, params), preprocessing


def run_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that `path` names, of a run the newest.

    Raises:
      UserError: there is none, or it is damaged.
    """
    checkpoints, step = _open(path)
    if step is None:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"the run in {path} has saved no checkpoint yet: wait for its first")
        path = path / _CHECKPOINTS / str(step)
    meta = checkpoints.meta(step)
    return Checkpoint(path, step, current_config(meta["config"]), checkpoints.metrics(step))


def _is_step(path: Path) -> bool:
    path = path.absolute()
    return path.name.isdecimal() and path.parent.name == _CHECKPOINTS


def _open(path: Path) -> tuple[Any, int | None]:
    """The checkpoints of a run, and the step of the one that `path` names; None: the newest valid one."""
    from cait_jax.checkpoint.store import Checkpoints

    if _is_step(path):
        return Checkpoints(path.absolute().parent), int(path.name)
    return Checkpoints(path / _CHECKPOINTS), None


def _meta(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The metadata of a run, and its parameters where they tell what old metadata do not, else nothing."""
    checkpoints, step = _open(path)
    meta = checkpoints.meta(step)
    if "class_names" in meta and "channels" in meta:
        return meta, {}
    params, meta = _restore(path, "params")
    return meta, params


def _restore(path: Path, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
    checkpoints, step = _open(path)
    if part == "ema" and not checkpoints.meta(step)["config"]["optimizer"]["ema_decay"]:
        raise UserError(
            f"the run in {path} kept no average of its parameters (optimizer.ema_decay is 0): leave out "
            f"{setting('ema', True)}"
        )
    restored = checkpoints.restore_part(part, step=step)
    if restored is None:
        raise UserError(f"the run in {path} has saved no checkpoint yet: wait for its first")
    _, params, meta = restored
    return params, meta


def _objective(meta: Mapping[str, Any]) -> str:
    """Older configs have no such key, and their runs learnt from labels."""
    return str(meta["config"].get("objective", "supervised"))


def _known_objective(path: Path, objective: str) -> str:
    if objective != "supervised" and backbone_of(objective) is None:
        raise UserError(f"the run in {path} {_no_classifier(path, objective)}")
    return objective


def _no_classifier(path: Path, objective: str) -> str:
    return (
        f"learnt without labels ({objective}) and is no classifier: train one from it by train.py with "
        f"--config.init.weights={path}"
    )


def _model(path: Path, meta: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
    """The network as it was trained, or the one that an objective without labels trains the features of."""
    config = current_config(meta["config"])
    objective = _known_objective(path, _objective(meta))
    backbone = backbone_of(objective)
    model: Any = create_model(
        image_size=_image_size(config),
        num_classes=len(_class_names(meta, params)) if backbone is None else 0,
        in_channels=_channels(meta, params),
        **config["model"],
    )
    if backbone is not None and (model := backbone.network(model)) is None:
        raise UserError(
            f"the run in {path} has a class token, which this objective does not train; it "
            f"{_no_classifier(path, objective)}"
        )
    return model


def _image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config["image_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# Old runs, all of CaiT, saved neither class names nor channels.


def _class_names(meta: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[str, ...]:
    if "class_names" in meta:
        return tuple(meta["class_names"])
    return tuple(str(i) for i in range(params["head"]["bias"].shape[0]))


def _channels(meta: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    if "channels" in meta:
        return int(meta["channels"])
    return int(params["patch_embed"]["proj"]["kernel"].shape[2])
