"""Checkpoints: written asynchronously by Orbax, sealed with SHA-256 sums, restored strictly.

Orbax neither syncs what it writes to the disk nor notices a flipped bit. So a step counts only once
it is sealed: its files and directories are synced, then a manifest of their sums is put in place.

    DIRECTORY/<step>/state/         the arrays
    DIRECTORY/<step>/meta/          JSON
    DIRECTORY/<step>/manifest.json  the seal: size and SHA-256 of each file, and the metrics
    DIRECTORY/broken/<step>         what was in the way of a save and could not be used
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_manager import StepAlreadyExistsError

from cait_jax.errors import UserError, one_line
from cait_jax.files import (
    MANIFEST,
    DamagedError,
    amend,
    commit,
    fsync,
    json_values,
    read_manifest,
    to_json,
    verify,
)
from cait_jax.sharding import leaf_shapes

_log = logging.getLogger(__name__)

_BROKEN = "broken"
_STATE = "state"
_META = "meta"

# What process 0 tells the others instead of a step.
_NOTHING_SAVED = -1
_NOTHING_USABLE = -2


class Checkpoints:
    """The checkpoints of one run under `directory`, which all processes share.

    Every process makes the same calls in the same order; process 0 seals, verifies and decides.
    Construction changes nothing on disk, so that the checkpoints of a run in progress can be read
    beside it: the first `save` makes the directory and clears away what a killed run left.

    Call `close`, or use it as a context manager: leaving without loses the save in flight.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: str = "max",
    ) -> None:
        """Opens `directory`, which need not exist yet.

        Args:
          directory: where the steps are.
          keep: how many of the newest sealed steps to keep. One more stays until the next save is
            sealed, because nothing old is deleted for a step that is not.
          best_metric: the key of `metrics` whose best step is kept as well; None: none is.
          best_mode: `"max"` or `"min"`.

        Raises:
          UserError: `keep` is less than 1 or `best_mode` is neither of the two.
        """
        if keep < 1:
            raise UserError(f"The number of checkpoints to keep is {keep}, and must be 1 or more.")
        if best_mode not in ("max", "min"):
            raise UserError(f"best_mode is {best_mode!r}, and must be 'max' or 'min'.")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._best_metric = best_metric
        self._sign = 1.0 if best_mode == "max" else -1.0
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, Exception] | None = None
        self._corrupt: dict[int, str] = {}
        self._reported: set[tuple[int, str]] = set()

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes. While another exception passes through, a failed save is logged, not raised."""
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            _log.error("%s", failure)

    def save(
        self,
        step: int,
        state: PyTree,
        meta: Mapping[str, Any],
        metrics: Mapping[str, SupportsFloat] | None = None,
    ) -> None:
        """Starts saving `state` and returns once it is copied to host memory.

        The arrays may be donated right after. Writing, sealing and deleting old steps go on in the
        background; a save that is still going on is waited for first.

        Args:
          step: the number of the step, 0 or more.
          state: pytree of arrays of any dtype but PRNG keys.
          meta: what JSON can hold; a number that is not finite, such as a loss, becomes null.
          metrics: of this step. Without a finite `best_metric` among them it cannot be the best.

        Raises:
          UserError: the save before this one failed, this one did, or `step` is already saved.
        """
        self.wait()
        snapshot = json.loads(to_json(meta))
        values = _finite(metrics or {})
        try:
            manager = self._writer()
            self._saving = step
            items = {_STATE: ocp.args.StandardSave(state), _META: ocp.args.JsonSave(snapshot)}
            manager.save(step, args=ocp.args.Composite(**items), force=True)
        except StepAlreadyExistsError:
            self._discard_writer()
            raise UserError(
                f"Step {step} is already saved under {self._directory}: resume from it, or save "
                "to another directory."
            ) from None
        except Exception as error:  # Orbax raises all sorts
            self._discard_writer()
            raise self._explain(step, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(manager, step, values), name="checkpoint_seal", daemon=True
        )
        self._thread.start()

    def record(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Adds the metrics of the step that was saved or restored last, once it is sealed.

        So a state can be saved before it is evaluated. Returns at once; a failure is raised by the next `save`,
        `wait` or `close`.

        Args:
          step: its number.
          metrics: of this step, replacing those given to `save`.
        """
        if jax.process_index() != 0:
            return
        values, saving = _finite(metrics), self._thread

        def write() -> None:
            if saving is not None:
                saving.join()
            if self._failure is None:
                try:
                    amend(self._path(step), {"metrics": values})
                except Exception as error:
                    self._failure = step, error

        self._thread = threading.Thread(target=write, name="checkpoint_metrics", daemon=True)
        self._thread.start()

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics of a sealed step, NaN where one was not finite; empty if none were given."""
        self._settle()
        metrics = read_manifest(self._path(step))["metrics"]
        return {name: math.nan if value is None else value for name, value in metrics.items()}

    def latest_step(self) -> int | None:
        """The newest sealed step, by its manifest alone; None without one."""
        return max(self._sealed(), default=None)

    def best_step(self) -> int | None:
        """The sealed step with the best `best_metric`, of equals the newest; None without one."""
        return self._best(self._sealed())

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` of a step, without reading its arrays (only their files' sizes are checked).

        Args:
          step: which; None: the newest good one.

        Raises:
          UserError: there is no such step, or none that is good.
        """
        self._settle()
        chosen = self._choose(step, _check_meta)
        if step is None:
            self._discard_writer()  # it clears away what was passed over when it opens again
        if chosen is None:
            raise UserError(f"There is no checkpoint under {self._directory}.")
        return self._read_meta(chosen)

    def restore(
        self, template: PyTree, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Restores a step after checking every file of it against the manifest.

        A newest step that is unsealed or damaged is passed over with a warning in the log, and
        moved to `broken/` by the next `save`. A single step without a seal and nothing else is what
        a first save leaves when it is killed, and counts as nothing saved.

        Args:
          template: pytree of `jax.ShapeDtypeStruct` with shardings, or of arrays; a leaf without
            a sharding goes to the first local device.
          step: which, and no other in its place; None: the newest good one.

        Returns:
          The step, the state with the types, dtypes and shardings of `template`, and its `meta`;
          None if nothing was saved.

        Raises:
          UserError: there are steps, but none that is good; the step asked for is missing or
            damaged; the tree, a shape or a dtype differs from `template`.
        """
        self._settle()
        chosen = self._agree(step)
        if step is None:
            self._discard_writer()  # it clears away what was passed over when it opens again
        if chosen is None:
            return None
        return chosen, *self._read(chosen, template)

    def restore_part(
        self, part: str, template: PyTree | None = None, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Restores one part of a saved state to host memory; the other parts' arrays are not loaded.

        Every file of the step is checked against the manifest first, as in `restore`. A run may go on
        saving in the meantime: when it deletes the newest step while that is read, the next one is taken.

        Args:
          part: the name of a field of the state, such as `"params"`.
          template: shapes and dtypes that it must have; None: it comes as it was saved, in dicts and
            lists.
          step: which, and no other in its place; None: the newest good one.

        Returns:
          The step, the part with numpy arrays as leaves, and the step's `meta`; None if nothing was
          saved.

        Raises:
          UserError: as `restore` does, and if the state has no such part or the part is empty.
        """
        self._settle()
        while True:
            newest = self.latest_step()
            try:
                chosen = self._agree(step)
                return (
                    None if chosen is None else (chosen, *self._read_part(chosen, part, template))
                )
            except Exception:
                overtaken = step is None and self.latest_step() != newest
                if not overtaken or jax.process_count() > 1:
                    raise

    def wait(self) -> None:
        """Returns when what was saved is on disk and sealed.

        Raises:
          UserError: that failed. Said once; the next `save` starts afresh.
        """
        self._settle()
        if self._failure is not None:
            step, error = self._failure
            self._failure = None
            self._discard_writer()
            raise self._explain(step, error) from error

    def close(self) -> None:
        """Waits as `wait` does, and frees Orbax's threads. May be called twice."""
        try:
            self.wait()
        finally:
            self._discard_writer()

    # Saving

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _writer(self) -> ocp.CheckpointManager:
        """Orbax's manager, opened if it is not."""
        if self._manager is None:
            if jax.process_index() == 0:
                self._make_directory()
                self._clear_way()
            # Opening has a barrier, so the others see the directory as process 0 left it.
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    cleanup_tmp_directories=True,
                    preservation_policy=_Preserve(self._wanted),
                ),
            )
            self._corrupt.clear()
        return self._manager

    def _discard_writer(self) -> None:
        manager, self._manager = self._manager, None
        if manager is None:
            return
        with contextlib.suppress(Exception):  # raises a failure once more, which would end close()
            manager.wait_until_finished()
        try:
            manager.close()
        except Exception:
            _log.warning("Closing Orbax's checkpoint manager failed.", exc_info=True)

    def _make_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # the parent may be somebody else's
            fsync(self._directory.parent)

    def _clear_way(self) -> None:
        """Moves aside every step that is unsealed or known to be damaged."""
        sealed = self._sealed()
        for step in _steps(self._directory):
            path = self._path(step)
            if step in sealed:
                continue
            aside = _unused(self._directory / _BROKEN / str(step))
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
            _log.warning("Moved the unusable checkpoint %s to %s.", path, aside)

    def _wanted(self) -> set[int]:
        sealed = self._sealed()
        best = self._best(sealed)
        return {*sorted(sealed)[-self._keep :], *(s for s in (best, self._saving) if s is not None)}

    def _finish(
        self, manager: ocp.CheckpointManager, step: int, metrics: dict[str, float | None]
    ) -> None:
        """Body of the thread that waits for the commit and seals it."""
        try:
            manager.wait_until_finished()
            if jax.process_index() == 0:
                commit(self._path(step), {"step": step, "metrics": metrics})
        except Exception as error:
            self._failure = step, error

    def _settle(self) -> None:
        """Waits for the thread; a failure stays for `wait` to raise."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _explain(self, step: int, error: Exception) -> UserError:
        cause = one_line(f"{type(error).__name__}: {error}")
        return UserError(
            f"Saving step {step} under {self._directory} failed ({cause}): make room or mend the disk, then "
            "run the same command again, which goes on from the last checkpoint"
        )

    # Choosing

    def _sealed(self) -> dict[int, float | None]:
        """Each sealed step, and its best metric where it has one."""
        found: dict[int, float | None] = {}
        for step in _steps(self._directory):
            if step not in self._corrupt:
                with contextlib.suppress(DamagedError):
                    metrics = read_manifest(self._path(step))["metrics"]
                    found[step] = metrics.get(self._best_metric)
        return found

    def _best(self, sealed: dict[int, float | None]) -> int | None:
        ranked = [(self._sign * value, step) for step, value in sealed.items() if value is not None]
        return max(ranked)[1] if ranked else None

    def _agree(self, step: int | None) -> int | None:
        """`_choose` by process 0, heard by all, so that no two restore different steps."""
        failure: UserError | None = None
        choice = _NOTHING_SAVED
        if jax.process_index() == 0:
            try:
                chosen = self._choose(step, verify)
                choice = _NOTHING_SAVED if chosen is None else chosen
            except UserError as error:
                failure, choice = error, _NOTHING_USABLE
        if jax.process_count() > 1:
            choice = int(multihost_utils.broadcast_one_to_all(np.int32(choice)))
        if failure is not None:
            raise failure
        if choice == _NOTHING_USABLE:
            raise UserError(
                f"No checkpoint under {self._directory} can be used: the log of process 0 says why."
            )
        return None if choice == _NOTHING_SAVED else choice

    def _choose(self, step: int | None, check: Callable[[Path], None]) -> int | None:
        """The step asked for, or the newest that passes `check`; None if nothing was saved."""
        steps = _steps(self._directory)
        if step is not None:
            if step not in steps:
                there = ", ".join(map(str, steps)) or "none"
                raise UserError(
                    f"There is no checkpoint of step {step} under {self._directory}; "
                    f"there are: {there}."
                )
            try:
                check(self._path(step))
            except DamagedError as error:
                raise UserError(
                    f"The checkpoint of step {step} under {self._directory} is unusable: {error}."
                ) from None
            return step
        for candidate in reversed(steps):
            try:
                check(self._path(candidate))
            except DamagedError as error:
                self._pass_over(candidate, error)
            else:
                return candidate
        if len(steps) > 1 or any((self._path(s) / MANIFEST).exists() for s in steps):
            raise UserError(
                f"None of the checkpoints under {self._directory} can be used (steps "
                f"{', '.join(map(str, steps))}; the log names what is damaged): put back a copy of "
                "the directory, or move it away to start afresh."
            )
        return None

    def _pass_over(self, step: int, error: "DamagedError") -> None:
        if (self._path(step) / MANIFEST).exists():
            self._corrupt[step] = str(error)
        if (step, str(error)) not in self._reported:
            self._reported.add((step, str(error)))
            _log.warning(
                "Passing over the checkpoint of step %d under %s: %s.", step, self._directory, error
            )

    # Reading

    def _read_meta(self, step: int) -> dict[str, Any]:
        return ocp.JsonCheckpointHandler().restore(self._path(step) / _META)

    def _read(self, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        targets = jax.tree.map(_target, template)
        path = self._path(step)
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _META: ocp.JsonCheckpointHandler()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
            # Orbax would cast a dtype without a word.
            differences = _differences(reader.metadata(path).item_metadata[_STATE].tree, targets)
            if not differences:
                items = {_STATE: ocp.args.StandardRestore(targets), _META: ocp.args.JsonRestore()}
                try:
                    found = reader.restore(path, args=ocp.args.Composite(**items))
                except ValueError as error:  # a difference in nodes without leaves
                    differences = [one_line(str(error))]
                else:
                    return found[_STATE], found[_META]
        raise self._misfit(step, differences)

    def _read_part(
        self, step: int, part: str, template: PyTree | None
    ) -> tuple[PyTree, dict[str, Any]]:
        path = self._path(step)
        handlers = {_STATE: ocp.PyTreeCheckpointHandler(), _META: ocp.JsonCheckpointHandler()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
            stored = reader.metadata(path).item_metadata[_STATE].tree
            if not jax.tree.leaves(stored.get(part)):
                there = ", ".join(sorted(name for name in stored if jax.tree.leaves(stored[name])))
                raise UserError(
                    f"The checkpoint of step {step} under {self._directory} holds no {part}; it "
                    f"holds {there}."
                )
            shapes = {part: jax.tree.map(_shape, stored[part])}
            differences = [] if template is None else _differences(shapes, {part: template})
            if differences:
                raise self._misfit(step, differences)
            how = jax.tree.map(lambda leaf: ocp.RestoreArgs(np.ndarray, leaf.dtype), shapes)
            items = {
                _STATE: ocp.args.PyTreeRestore(shapes, restore_args=how, partial_restore=True),
                _META: ocp.args.JsonRestore(),
            }
            restored = reader.restore(path, args=ocp.args.Composite(**items))
        found = restored[_STATE][part]
        if template is not None:
            found = jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(found))
        return found, restored[_META]

    def _misfit(self, step: int, differences: list[str]) -> UserError:
        more = f"; and {len(differences) - 1} more" if len(differences) > 1 else ""
        return UserError(
            f"The checkpoint of step {step} under {self._directory} does not fit the state to be "
            f"restored: {differences[0]}{more}."
        )


@dataclasses.dataclass(frozen=True)
class _Preserve:
    """Orbax's preservation policy: the steps that `wanted` returns."""

    wanted: Callable[[], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One bool for each of `checkpoints`, the one being saved included."""
        wanted = self.wanted()
        return [checkpoint.step in wanted for checkpoint in checkpoints]


def _steps(directory: Path) -> list[int]:
    """The steps that Orbax has committed, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def _unused(path: Path) -> Path:
    candidate, count = path, 1
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def _finite(metrics: Mapping[str, SupportsFloat]) -> dict[str, float | None]:
    return json_values({key: float(value) for key, value in metrics.items()})


def _check_meta(path: Path) -> None:
    verify(path, prefix=f"{_META}/")


# Fitting the template


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _differences(stored: PyTree, targets: PyTree) -> list[str]:
    """How the leaves stored differ from those asked for, one clause each."""
    here, there = leaf_shapes(targets), leaf_shapes(stored)
    clauses = [f"{name} is not in the checkpoint" for name in here if name not in there]
    clauses += [f"the checkpoint's {name} has no place in it" for name in there if name not in here]
    for name in here:
        if name in there and here[name] != there[name]:
            clauses.append(f"{name} is {there[name]} in the checkpoint and should be {here[name]}")
    return clauses
