"""The settings and data of a checkpoint, which a resumed run must have."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from cait_jax.errors import UserError, can_set, setting
from cait_jax.renamed import current_config
from cait_jax.train.config import as_json, flatten, with_missing

# What may differ when a run is resumed: it changes no number of the run, or of a run that would have stopped.
FREE_KEYS = (
    "report",
    "mesh",
    "data.data_dir",
    "data.workers",
    "checkpoint",
    "nonfinite",
    "watchdog",
    "mae.pictures_every_epochs",
)
_OF_SPLITS = ("name", "train_split", "eval_split")


def is_free(key: str) -> bool:
    """Whether the flat key is one of `FREE_KEYS` or in such a section."""
    return f"{key}.".startswith(tuple(f"{free}." for free in FREE_KEYS))


def check_resumed(
    meta: Mapping[str, Any], config: ConfigDict, now: Mapping[str, Any], workdir: str
) -> None:
    """Refuses to resume a run with settings or on data that would make it another run.

    Data that changed under the same name are named before the settings that follow from their size. A folder may
    have moved if its list of files is the same.

    Args:
      meta: of the checkpoint.
      now: `data.split.identity` of the splits `train` and `eval`, and of `train` its `sampler.recorded_order`.

    Raises:
      UserError: naming the settings that differ, or the first difference of the data.
    """
    if not isinstance(meta.get("config"), Mapping):
        raise UserError(
            f"the newest checkpoint in {workdir} has no config in its metadata, so it is of something else: give "
            "another --workdir"
        )
    saved, current = dict(meta["config"]), as_json(config)
    recorded = meta.get("data", {})
    if recorded == now and all("files_sha256" in split for split in recorded.values()):
        saved["data"] = {**saved["data"], "name": current["data"]["name"]}
    if all(saved["data"].get(key) == current["data"].get(key) for key in _OF_SPLITS):
        check_same_data(meta, now, workdir)
    check_resumable(saved, config, workdir)
    check_same_data(meta, now, workdir)


def check_resumable(saved: Mapping[str, Any], current: ConfigDict, workdir: str) -> None:
    """Refuses to resume a run under settings that would make it another run, listing the keys that differ.

    `saved` is the config in the run's checkpoint, as `as_json` gave it; keys may have their old names.
    """
    before, now = with_missing(flatten(current_config(saved))), flatten(as_json(current))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not is_free(key)
    ]
    # Of a command that has options for some, the others follow from these.
    own = [key for key in changed if can_set(f"config.{key}")] or changed
    clauses = [f"{_bare(key)} was {before.get(key)!r} and is now {now.get(key)!r}" for key in own]
    if changed:
        raise UserError(
            f"the run in {workdir} was started with other settings: {'; '.join(clauses)}: take them back "
            "to resume it, or give another --workdir to start anew"
        )


def _bare(key: str) -> str:
    """The key where it is how the user sets it, else the command's option."""
    written = setting(f"config.{key}")
    return key if written == f"--config.{key}" or not written.startswith("-") else written


def check_same_data(meta: Mapping[str, Any], now: Mapping[str, Any], workdir: str) -> None:
    """Refuses to resume a run on data that would make it another run.

    Args:
      meta: of the checkpoint. One of before `data` was recorded has the class names of training alone.

    Raises:
      UserError: naming the first difference.
    """
    known = {"train": {"class_names": meta["class_names"]}} if "class_names" in meta else {}
    known = meta.get("data", known)
    for split, before in known.items():
        difference = _difference(before, now[split])
        if difference:
            which = "training" if split == "train" else "evaluation"
            raise UserError(
                f"the run in {workdir} was started on other {which} data: {difference}; put the data back as they "
                "were to resume it, or give another --workdir to start anew"
            )
    order = known.get("train", {}).get("order")
    if order != now["train"].get("order"):
        raise UserError(
            f"the run in {workdir} was started by a version that shows the {now['train']['examples']} images of "
            "training in another order: resume it with that version, or give another --workdir to start anew"
        )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before["class_names"], now["class_names"]
    if len(old) != len(new):
        odd = sorted(set(old) ^ set(new))
        named = f", such as {odd[0]!r}" if odd else ""
        return f"it had {len(old)} classes and has {len(new)} now{named}"
    for label, names in enumerate(zip(old, new, strict=True)):
        if names[0] != names[1]:
            return f"class {label} was {names[0]!r} and is {names[1]!r} now"
    if before.get("examples", now["examples"]) != now["examples"]:
        return f"it had {before['examples']} images and has {now['examples']} now"
    if before.get("files_sha256") not in (None, now.get("files_sha256")):
        return "its files have other names or are in other classes now"
    return ""
