"""Checkpoints: written in the background by Orbax, committed with checksums, restored strictly.

Orbax neither syncs to the disk nor notices a flipped bit. So a step counts only once it is committed: files and
directories are synced, then a manifest of their checksums is put in place.

    DIRECTORY/run.json              the run's id
    DIRECTORY/<step>/state/         the arrays
    DIRECTORY/<step>/meta/          JSON
    DIRECTORY/<step>/manifest.json  step, run, metrics, SHA-256 of the config and of each file
    DIRECTORY/broken/<step>         what was in the way of a save and could not be used; the last three
"""

import contextlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from cait_jax import files
from cait_jax.checkpoint import manifest, reader
from cait_jax.checkpoint.orbax_logs import quiet_errors
from cait_jax.errors import StorageError, UserError, one_line
from cait_jax.sharding import copy_to_host

_log = logging.getLogger(__name__)
_BROKEN_KEPT = 3


class Checkpoints(AbstractContextManager["Checkpoints", None]):
    """The checkpoints of one run under `directory`, which all processes share.

    Every process makes the same calls in the same order. Nothing on disk changes before the first `save`, which
    also moves away what a killed run left. Left without `close` or `with`, the save in flight is lost.
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
          keep: how many of the newest committed steps to keep; one more stays until the next save is committed.
          best_metric: the key of `metrics` whose best step (`best_mode`: `"max"` or `"min"`) is kept as well.
        """
        if keep < 1:
            raise UserError(f"The number of checkpoints to keep is {keep}, and must be 1 or more.")
        if best_mode not in ("max", "min"):
            raise UserError(f"best_mode is {best_mode!r}, and must be 'max' or 'min'.")
        quiet_errors()
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._best_metric = best_metric
        self._sign = 1.0 if best_mode == "max" else -1.0
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._host_state: PyTree = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, Exception] | None = None
        self._damage: dict[int, str] = {}

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
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
        metrics: Mapping[str, float] | None = None,
        *,
        rollback_point: bool = True,
    ) -> None:
        """Starts saving, after the save before; returns once `state` is copied to the host and may be donated.

        Args:
          state: pytree of arrays of any dtype but PRNG keys.
          meta: JSON, where numbers that are not finite become null.
          metrics: of this step; without a finite `best_metric` it cannot be the best.
          rollback_point: whether it is one of `rollback_step`'s; the newest of these is kept.

        Raises:
          StorageError: this save or the one before failed.
          UserError: `step` is already saved.
        """
        self.wait()
        snapshot = json.loads(files.to_json(meta))
        fields = {
            "format": manifest.FORMAT,
            "step": step,
            "metrics": files.json_values(metrics or {}),
            "rollback_point": rollback_point,
            "config_sha256": manifest.config_sha256(snapshot),
        }

        def start(manager: ocp.CheckpointManager, state: PyTree) -> None:
            items = {
                manifest.STATE: ocp.args.StandardSave(state),
                manifest.META: ocp.args.JsonSave(snapshot),
            }
            manager.save(step, args=ocp.args.Composite(**items), force=True)

        alone = jax.process_count() == 1
        try:
            manager = self._open_manager()
            if step in self._steps():
                raise UserError(
                    f"Step {step} is already saved under {self._directory}: resume from it, or save "
                    "to another directory."
                )
            self._saving = step
            if not alone:
                start(manager, state)
        except UserError:
            self._close_manager()
            raise
        except Exception as error:  # Orbax raises all sorts
            self._close_manager()
            raise self._save_failed(step, error) from error
        # Orbax takes longer to begin than to copy, by the number of arrays.
        if alone:
            self._host_state = copy_to_host(state, self._host_state)

        def finish() -> None:
            if alone:
                start(manager, self._host_state)
            manager.wait_until_finished()
            if jax.process_index() == 0:
                manifest.commit(
                    self._path(step), {**fields, "run": manifest.run_id(self._directory)}
                )
            self._saving = None

        self._in_background(step, finish)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Replaces the metrics of the step saved or restored last, once it is committed (so it is saved first).

        Returns at once; a failure is raised by the next `save`, `wait` or `close`.
        """
        if jax.process_index() == 0:
            fields = {"metrics": files.json_values(metrics)}
            self._in_background(step, lambda: manifest.amend(self._path(step), fields))

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics of a committed step, NaN where one was not finite; empty if none were given."""
        self._join()
        recorded = self._manifest(step, manifest.run_id(self._directory))["metrics"].items()
        return {name: math.nan if value is None else value for name, value in recorded}

    def rollback_step(self) -> int | None:
        """The newest good step that was saved as a `rollback_point`; None if there is none."""

        def choose() -> int | None:
            points = [step for step in self._committed() if self._is_point(step)]
            return reader.choose_step(self._directory, sorted(points), None, self._damage)

        self._join()
        return reader.agree_on_step(self._directory, choose)

    def latest_step(self) -> int | None:
        """The newest committed step, by its manifest alone."""
        return max(self._committed(), default=None)

    def best_step(self) -> int | None:
        """The committed step with the best `best_metric`, of equals the newest."""
        return self._best(self._committed())

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` of a step, by default the newest good one; of its arrays only the sizes are checked."""
        self._join()
        if step is None:
            self._close_manager()  # what is passed over is moved away when it opens again
        return reader.read_meta(self._directory, self._steps(), step, self._damage)

    def restore(
        self, template: PyTree, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Restores a step, by default the newest good one, after verifying every file of it.

        A newest step that is damaged or not committed is passed over with a warning in the log, and moved to
        `broken/` by the next `save`. Where a first save was killed nothing was saved.

        Args:
          template: pytree of arrays or `jax.ShapeDtypeStruct`; a leaf without a sharding goes to the first local
            device.

        Returns:
          The step, the state with types and shardings of `template`, and its `meta`; None if nothing was saved.

        Raises:
          UserError: no step is good; the one asked for is missing or damaged; tree, shape or dtype differs.
        """
        return self._restore(step, lambda path: reader.read_state(path, template))

    def restore_part(
        self, part: str, template: PyTree | None = None, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Restores one field of a saved state, such as `"params"`, to numpy arrays; the others are not loaded.

        As `restore`, but without a template the part comes as it was saved, in dicts and lists.
        """
        return self._restore(step, lambda path: reader.read_part(path, part, template))

    def wait(self) -> None:
        """Returns when what was saved is committed. A failure is raised once; the next `save` starts afresh."""
        self._join()
        if self._failure is not None:
            step, error = self._failure
            self._failure = None
            self._close_manager()
            raise self._save_failed(step, error) from error

    def close(self) -> None:
        """Waits as `wait` does, and frees Orbax's threads. May be called twice."""
        try:
            self.wait()
        finally:
            self._close_manager()

    # Saving

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _open_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):  # the parent may be somebody else's
                    files.fsync(self._directory.parent)
                self._move_broken_steps()
                run = manifest.run_id(self._directory) or secrets.token_hex(8)
                with files.atomic_replace(self._directory / manifest.RUN) as temporary:
                    temporary.write_text(json.dumps({"format": manifest.FORMAT, "run": run}))
            # Opening has a barrier, so the others see the directory as process 0 left it.
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    cleanup_tmp_directories=True, preservation_policy=self
                ),
            )
            self._damage.clear()
        return self._manager

    def _close_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is None:
            return
        failed = False
        try:
            manager.wait_until_finished()
        except Exception:  # a failed save, of which `wait` tells
            failed = True
        try:
            manager.close()
        except Exception as error:
            if not failed:
                _log.warning(
                    "Closing Orbax's checkpoint manager failed (%s).", one_line(repr(error))
                )

    def _move_broken_steps(self) -> None:
        for step in set(self._steps()) - set(self._committed()):
            aside, count = self._directory / "broken" / str(step), 1
            while aside.exists():
                count += 1
                aside = aside.with_name(f"{step}-{count}")
            aside.parent.mkdir(exist_ok=True)
            self._path(step).rename(aside)
            aside.touch()
            _log.warning("Moved the unusable checkpoint %s to %s.", self._path(step), aside)
            old = sorted(aside.parent.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in old[:-_BROKEN_KEPT]:
                shutil.rmtree(path, ignore_errors=True)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's preservation policy: the newest committed steps, the best, and the one being saved."""
        committed = self._committed()
        points = filter(self._is_point, committed)
        newest_point = max(points, default=None)
        kept = {
            *sorted(committed)[-self._keep :],
            self._best(committed),
            newest_point,
            self._saving,
        }
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def _in_background(self, step: int, work: Callable[[], None]) -> None:
        """Runs `work` in a thread, after what is in the background already and unless that fails."""
        previous = self._thread

        def run() -> None:
            if previous is not None:
                previous.join()
            if self._failure is None:
                try:
                    work()
                except Exception as error:
                    self._failure = step, error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        """Waits for the background; a failure stays for `wait` to raise."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save_failed(self, step: int, error: Exception) -> StorageError:
        """Removes what there is of a step that was being saved, as it may be what fills the disk; the error.

        A step that was committed and could not be amended stays, whether or not it can be read now.
        """
        unfinished = step == self._saving and step not in self._committed()
        if jax.process_index() == 0 and unfinished:
            for path in (*self._directory.glob(f"{step}.*"), self._path(step)):
                shutil.rmtree(path, ignore_errors=True)
        return StorageError(
            f"Saving step {step} under {self._directory} failed ({_reason(error)}): "
            "make room or mend the disk"
        )

    # Reading

    def _steps(self) -> list[int]:
        """The steps that Orbax has finished writing, ascending."""
        found = self._directory.iterdir() if self._directory.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal() and path.is_dir())

    def _committed(self) -> dict[int, float | None]:
        """Each step with a valid manifest that is not known to be damaged, and its best metric."""
        found: dict[int, float | None] = {}
        run = manifest.run_id(self._directory)
        for step in self._steps():
            if step not in self._damage:
                with contextlib.suppress(manifest.DamagedError):
                    found[step] = self._manifest(step, run)["metrics"].get(self._best_metric)
        return found

    def _manifest(self, step: int, run: str | None) -> dict[str, Any]:
        return manifest.of_step(self._path(step), run, manifest.cached)

    def _is_point(self, step: int) -> bool:
        """Of a committed step."""
        return bool(manifest.cached(self._path(step)).get("rollback_point", True))

    def _best(self, committed: Mapping[int, float | None]) -> int | None:
        known = {step: value for step, value in committed.items() if value is not None}
        return max(known, key=lambda step: (self._sign * known[step], step), default=None)

    def _restore(
        self, step: int | None, read: Callable[[Path], tuple[PyTree, dict[str, Any]]]
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        self._join()
        if step is None and not self._steps() and jax.process_count() == 1:
            return None
        if step is None:
            self._close_manager()

        def choose() -> int | None:
            return reader.choose_step(self._directory, self._steps(), step, self._damage)

        return reader.restore(self._directory, choose, self.latest_step, read)


def _reason(error: Exception) -> str:
    """What the system says of a failure; TensorStore's exceptions have its number in their text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(found[1]) if found else getattr(error, "errno", None)
    return os.strerror(code) if code else one_line(f"{type(error).__name__}: {error}")
