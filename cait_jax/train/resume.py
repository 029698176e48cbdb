"""What a run left behind: its metrics, cut to its checkpoint, whose settings and data a resumed run must have."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cait_jax.errors import UserError, can_set, setting
from cait_jax.files import atomic_replace, to_json
from cait_jax.reading import check_regular, parse_json
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
# The keys of `metrics.jsonl` that may differ between two runs of the same config.
TIMING_KEYS = ("time", "train/images_per_second")
MAX_LINE = 2**20
"""Bytes of a line of `metrics.jsonl`."""
_OF_SPLITS = ("name", "train_split", "eval_split")


def check_resumed(
    meta: Mapping[str, Any], config: ConfigDict, now: Mapping[str, Any], workdir: str
) -> None:
    """Refuses to resume a run with settings or on data that would make it another run.

    Data that changed under the same name are named before the settings that follow from their size. A folder may
    have moved if its list of files is the same.

    Args:
      meta: of the checkpoint.
      now: `data.split.identity` of the splits `train` and `eval`.

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
        if before.get(key) != now.get(key)
        and not f"{key}.".startswith(tuple(f"{free}." for free in FREE_KEYS))
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


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` in their order, without a torn last one; `[]` for no file."""
    file = Path(path)
    return [row for _, row in metric_lines(file)] if file.exists() else []


def metric_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line and its row, whose `step` is an int. A power cut can leave lines that are not whole.

    Lines of more than `MAX_LINE` bytes are none. Raises `OSError` for what is no regular file.
    """
    check_regular(file)
    with file.open("rb") as stream:
        while line := stream.readline(MAX_LINE):
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                continue
            line = line.removesuffix(b"\n")
            with contextlib.suppress(ValueError):
                row = parse_json(line.decode())
                if isinstance(row, dict) and type(row.get("step")) is int:
                    yield line, row


def rewind(
    path: Path, step: int, *, evaluated: bool = True, expected: Mapping[str, Any] | None = None
) -> str:
    """Cuts every line after `step` from a `metrics.jsonl`, and lines that are not whole.

    Args:
      evaluated: whether the evaluation of `step` itself stays.
      expected: `MetricWriter.written` when `step` was saved.

    Returns:
      A sentence if lines of before the save are lost or changed, else an empty string.
    """

    def stays(row: dict[str, Any]) -> bool:
        if row["step"] == step and not evaluated:
            return not any(key.startswith("eval/") for key in row)
        return bool(row["step"] <= step)

    digest, size = LinesDigest(), 0
    for line, row in metric_lines(path) if path.exists() else ():
        if stays(row):
            size += len(line) + 1
            if expected and digest.lines < expected["lines"]:
                digest.add(row)
    if path.exists() and size != path.stat().st_size:
        with atomic_replace(path) as temporary, temporary.open("wb") as stream:
            stream.writelines(line + b"\n" for line, row in metric_lines(path) if stays(row))
    if not expected or digest.value() == expected:
        return ""
    return (
        f"{path} has lost lines or they were changed since step {step} was saved, when it had "
        f"{expected['lines']}; there are {digest.lines}, and training goes on after them"
    )


class LinesDigest:
    """SHA-256 of the rows of a `metrics.jsonl` without their times: the same however often a run was resumed."""

    def __init__(self) -> None:
        self.lines, self._sha256 = 0, hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes the next row."""
        timeless = {key: value for key, value in row.items() if key not in TIMING_KEYS}
        self._sha256.update(to_json(timeless).encode() + b"\n")
        self.lines += 1

    def value(self) -> dict[str, Any]:
        """Number of rows and their digest, as JSON."""
        return {"lines": self.lines, "sha256": self._sha256.hexdigest()}
