"""A new head on features that do not change: `cait finetune --what head`, and the start of `two-phase`.

Where nothing before the head learns, an image has the same features in every epoch. They are computed once and
kept by the SHA-256 of the file, and the head is scikit-learn's logistic regression on them, whose strength of
regularisation is chosen by cross-validation on the training images.
"""

import dataclasses
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float32, Int
from ml_collections import ConfigDict

from cait_jax.data.folder import load_folder
from cait_jax.data.image_files import FolderRecords
from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import UserError, setting
from cait_jax.evaluation.features import Answers, linear_probe, run_over_photographs
from cait_jax.evaluation.scores import show_progress
from cait_jax.files import atomic_replace, sha256
from cait_jax.reading import check_regular
from cait_jax.sharding import make_mesh
from cait_jax.train.finetune import Photographs
from cait_jax.weights.model_json import model_to_dict, replace_attributes
from cait_jax.weights.timm_names import to_timm

# Strengths to choose from: scikit-learn's C, of standardised features.
_INVERSE_L2 = tuple(10.0**power for power in range(-5, 3))
_FOLDS = 5
_STORE = "features.npz"
_HEADS = ("head", "head_dist")
_SECONDS_BETWEEN_WRITES = 30.0
# Files that cannot be read, each with the reason.
Broken = tuple[tuple[Path, str], ...]


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear classifier: logits are `features @ kernel + bias`.

    Attributes:
      kernel: float32 (d, classes).
      bias: float32 (classes,).
      inverse_l2: the strength chosen, scikit-learn's C on standardised features.
    """

    kernel: Float32[np.ndarray, "d classes"]
    bias: Float32[np.ndarray, " classes"]
    inverse_l2: float

    def accuracy(self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"]) -> float:
        """The share, 0 to 1, whose largest logit is their label's."""
        return float(np.mean((features @ self.kernel + self.bias[None]).argmax(-1) == labels))


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A network with a fitted head, its accuracy (0 to 1) on so many `measured` images, and the broken files."""

    model: Any
    variables: dict[str, Any]
    head: Head
    accuracy: float
    measured: int
    broken: Broken


def fit_head(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    num_classes: int,
    *,
    seed: int = 0,
) -> Head:
    """Multinomial logistic regression on standardised features; its strength by log-loss in 5 folds.

    With one image of a class there are no folds, and C is 1. Classes without images get the bias of none.
    """
    probe = linear_probe(inverse_l2=1.0, max_iterations=10_000)
    folds = min(_FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds > 1:
        from sklearn.model_selection import GridSearchCV, StratifiedKFold

        search = GridSearchCV(
            probe,
            {"logisticregression__C": _INVERSE_L2},
            scoring="neg_log_loss",
            cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
        )
        probe = search.fit(features, labels).best_estimator_
    else:
        probe.fit(features, labels)
    scaler, regression = probe[0], probe[1]
    coefficients, intercept = regression.coef_, regression.intercept_
    if len(coefficients) == 1:  # two classes: the logit of the second
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
        intercept = np.concatenate([np.zeros_like(intercept), intercept])
    scaled = coefficients / scaler.scale_[None]
    kernel = np.zeros((features.shape[1], num_classes), np.float32)
    bias = np.full(num_classes, -1e9, np.float32)
    kernel[:, regression.classes_] = scaled.T
    bias[regression.classes_] = intercept - scaled @ scaler.mean_
    return Head(kernel, bias, float(regression.C))


class FolderFeatures:
    """The features that a network gives to images of folders, kept by the SHA-256 of the files.

    Args:
      model: without a head.
      store: an npz file of features of this network and preprocessing; made if missing. None: nothing is kept.
    """

    def __init__(
        self,
        model: Any,
        variables: Mapping[str, Any],
        preprocessing: Preprocessing,
        store: Path | None,
    ):
        self._model, self._variables, self._preprocessing = model, variables, preprocessing
        self._network = _digest(model, variables, preprocessing)
        self._store = store
        self._known = {} if store is None else _read_store(store, self._network)

    def of(
        self,
        records: FolderRecords,
        *,
        batch_size: int = 32,
        progress: Callable[[int], object] = lambda images: None,
    ) -> tuple[Float32[np.ndarray, "n d"], Int[np.ndarray, "n"], Broken]:
        """Features and labels of the images that can be decoded, in order, and what is broken.

        `progress` is called with the number of images done since its last call.
        """
        known = self._known
        paths = [records.root / name for name in records.files]
        digests = [sha256(path) for path in paths]
        missing = {
            digest: path for digest, path in zip(digests, paths, strict=True) if digest not in known
        }
        progress(len(paths) - len(missing))
        broken: dict[str, str] = {}
        digest_of = {path: digest for digest, path in missing.items()}
        files = list(missing.values())
        pending: Iterable[Answers] = ()
        if files:
            pending = run_over_photographs(
                self._model.apply, self._variables, self._preprocessing, files,
                batch_size=batch_size, mesh=make_mesh(jax.local_devices()),
            )  # fmt: skip
        written = time.monotonic()
        try:
            for answers in pending:
                if answers.outputs is not None:
                    rows = np.asarray(answers.outputs, np.float32)
                    names = [digest_of[path] for path in answers.paths]
                    known |= dict(zip(names, rows, strict=True))
                broken |= {digest_of[path]: reason for path, reason in answers.broken}
                progress(len(answers.paths) + len(answers.broken))
                if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                    self._write()
                    written = time.monotonic()
        finally:  # also when it is interrupted
            if files and known:
                self._write()
        kept = [i for i, digest in enumerate(digests) if digest in known]
        if not kept:
            raise UserError(
                f"none of the {len(paths)} images in {records.root} can be read: {next(iter(broken.values()))}"
            )
        features = np.stack([known[digests[i]] for i in kept])
        reasons = [
            (path, broken[digest])
            for path, digest in zip(paths, digests, strict=True)
            if digest in broken
        ]
        return features, records.labels[kept], tuple(reasons)

    def _write(self) -> None:
        if self._store is not None:
            _write_store(self._store, self._network, self._known)


def fit_on_folder(
    photographs: Photographs,
    model: Any,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    workdir: Path,
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> Fitted:
    """Fits a head on a folder's training images and measures it on the others.

    Args:
      model: a transformer without a head, of `num_classes=0`.
      workdir: keeps the features, in `features.npz`.
      seed: of the folds.
    """
    source = FolderFeatures(model, variables, preprocessing, workdir / _STORE)
    found = []
    for name in (photographs.train_split, photographs.eval_split):
        records = load_folder(photographs.directory, name, channels=preprocessing.channels).records
        with show_progress(len(records), f"features of {name}") as update:
            found.append(source.of(records, batch_size=batch_size, progress=update))
    (features, labels, broken), (held_out, held_out_labels, more) = found
    classes = len(photographs.class_names)
    _check_classes(labels, broken, photographs.train_split)
    head = fit_head(features, labels, classes, seed=seed)
    whole = replace_attributes(model, num_classes=classes)
    accuracy = head.accuracy(held_out, held_out_labels)
    variables = {**variables, "params": _with_head(variables["params"], head, model)}
    return Fitted(whole, variables, head, accuracy, len(held_out), (*broken, *more))


def check_start(config: ConfigDict, split: Any) -> None:
    """Refuses `init.fit_head` where a head cannot be fitted on a training split.

    Raises:
      UserError: the split is no folder of images, or scikit-learn is missing.
    """
    if not isinstance(getattr(split, "records", None), FolderRecords):
        raise UserError(
            f"{setting('config.init.fit_head')} computes the features of a folder of images, and "
            f"{config.data.name} is none: set {setting('config.init.fit_head', False)}"
        )
    linear_probe(inverse_l2=1.0, max_iterations=1)


def params_with_fitted_head(
    config: ConfigDict, model: Any, params: Mapping[str, Any], split: Any, workdir: Path | None
) -> dict[str, Any]:
    """Parameters for the start of a run, whose head is fitted on the features of the training split.

    Args:
      model: of the run, with a head.
      split: a folder's.
      workdir: keeps the features, in `features.npz`; None: nothing is kept.

    Raises:
      UserError: the images that can be read are none, or of one class.
    """
    headless = replace_attributes(model, num_classes=0, precision="highest")
    body = {name: layer for name, layer in params.items() if name not in _HEADS}
    data = config.data
    prepare = Preprocessing(
        model.image_size, config.eval.crop_pct, tuple(data.mean), tuple(data.std), split.channels
    )
    store = workdir / _STORE if workdir is not None and jax.process_index() == 0 else None
    source = FolderFeatures(headless, {"params": body}, prepare, store)
    with show_progress(len(split.records), f"features of {data.train_split}") as update:
        features, labels, broken = source.of(
            split.records, batch_size=config.eval.batch_size, progress=update
        )
    _check_classes(labels, broken, data.train_split)
    head = fit_head(features, labels, model.num_classes, seed=config.seed)
    return _with_head(body, head, model)


def _check_classes(labels: Int[np.ndarray, "n"], broken: Broken, split: str) -> None:
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"the images of {split} that can be read are of one class: replace the broken ones, "
            f"such as {broken[0][0]}"
        )


def _with_head(params: Mapping[str, Any], head: Head, model: Any) -> dict[str, Any]:
    layer = {
        "kernel": jax.numpy.asarray(head.kernel, model.param_dtype),
        "bias": jax.numpy.asarray(head.bias, model.param_dtype),
    }
    return {**params, **dict.fromkeys(_HEADS[: 1 + model.distilled], layer)}


def _digest(model: Any, variables: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    """A checksum of all that features follow from, but for the image."""
    digest = hashlib.sha256(json.dumps(model_to_dict(model), sort_keys=True).encode())
    digest.update(json.dumps(dataclasses.asdict(preprocessing), sort_keys=True).encode())
    for name, array in sorted(to_timm(variables).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _read_store(store: Path, network: str) -> dict[str, np.ndarray]:
    """The features in a file; none if it is of another network, missing or damaged."""
    try:
        check_regular(store)
        with store.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if str(file["network"]) != network:
                return {}
            digests, features = file["sha256"], file["features"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    return (
        dict(zip(map(str, digests), features, strict=True)) if len(digests) == len(features) else {}
    )


def _write_store(store: Path, network: str, known: Mapping[str, np.ndarray]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    with atomic_replace(store) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            network=network,
            sha256=np.array(list(known)),
            features=np.stack(list(known.values())),
        )
