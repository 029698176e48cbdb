"""Choosing and reading a step of a run's checkpoints.

A state is restored only if tree, shapes and dtypes are those of the template; Orbax would cast a dtype without a
word.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from cait_jax.checkpoint.manifest import MANIFEST, META, STATE, DamagedError, run_id, verify
from cait_jax.errors import UserError, one_line
from cait_jax.sharding import leaf_shapes

_log = logging.getLogger(__name__)

# What process 0 broadcasts instead of a step.
_NOTHING_SAVED = -1
_NOTHING_USABLE = -2


def choose_step(
    directory: Path,
    steps: Sequence[int],
    step: int | None,
    damage: dict[int, str],
    prefix: str = "",
) -> int | None:
    """The step asked for, or the newest that `verify` accepts; None if nothing was saved.

    Args:
      steps: what is under `directory`, ascending.
      damage: receives why newer steps are passed over; what is new to it is logged.
      prefix: see `verify`.

    Raises:
      UserError: the step asked for is missing or damaged, or none can be used.
    """
    run = run_id(directory)
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"There is no checkpoint of step {step} under {directory}; there are: {there}."
        )
    for candidate in reversed(steps) if step is None else [step]:
        try:
            verify(directory / str(candidate), run, prefix)
        except DamagedError as error:
            if step is not None:
                raise UserError(
                    f"The checkpoint of step {step} under {directory} is unusable: {error}."
                ) from None
            if damage.get(candidate) != str(error):
                _log.warning(
                    "Passing over the checkpoint of step %d under %s: %s.",
                    candidate,
                    directory,
                    error,
                )
            damage[candidate] = str(error)
        else:
            damage.pop(candidate, None)
            return candidate
    # A single one without a manifest is a first save that was killed.
    if len(steps) > 1 or any((directory / str(step) / MANIFEST).exists() for step in steps):
        raise UserError(
            f"None of the checkpoints under {directory} can be used (steps {', '.join(map(str, steps))}; "
            "the log names what is damaged): put back a copy of the directory, or move it away to start afresh."
        )
    return None


def agree_on_step(directory: Path, choose: Callable[[], int | None]) -> int | None:
    """The result of `choose` in process 0, broadcast, so that no two restore different steps."""
    failure: UserError | None = None
    choice = _NOTHING_SAVED
    if jax.process_index() == 0:
        try:
            chosen = choose()
            choice = _NOTHING_SAVED if chosen is None else chosen
        except UserError as error:
            failure, choice = error, _NOTHING_USABLE
    if jax.process_count() > 1:
        choice = int(multihost_utils.broadcast_one_to_all(np.int32(choice)))
    if failure is not None:
        raise failure
    if choice == _NOTHING_USABLE:
        raise UserError(
            f"No checkpoint under {directory} can be used: the log of process 0 says why."
        )
    return None if choice == _NOTHING_SAVED else choice


def read_meta(
    directory: Path, steps: Sequence[int], step: int | None, damage: dict[int, str]
) -> dict[str, Any]:
    """The metadata of a step that is chosen as by `choose_step`, without a look into its arrays."""
    chosen = choose_step(directory, steps, step, damage, prefix=f"{META}/")
    if chosen is None:
        raise UserError(f"There is no checkpoint under {directory}.")
    meta: dict[str, Any] = ocp.JsonCheckpointHandler().restore(directory / str(chosen) / META)
    return meta


def restore(
    directory: Path,
    choose: Callable[[], int | None],
    latest_step: Callable[[], int | None],
    read: Callable[[Path], tuple[PyTree, dict[str, Any]]],
) -> tuple[int, PyTree, dict[str, Any]] | None:
    """The step that process 0 chooses and what `read` gives of it; chosen anew if a run deletes it meanwhile."""
    while True:
        newest = latest_step()
        try:
            chosen = agree_on_step(directory, choose)
            return None if chosen is None else (chosen, *read(directory / str(chosen)))
        except Exception:
            overtaken = latest_step() != newest  # only then is a step deleted
            if not overtaken or jax.process_count() > 1:
                raise


def read_state(path: Path, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The state, with the types and shardings of `template`, and the metadata."""
    targets = jax.tree.map(_target, template)
    handlers = {STATE: ocp.StandardCheckpointHandler(), META: ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
        stored = reader.metadata(path).item_metadata[STATE].tree
        differences = _differences(stored, targets)
        if not differences:
            # A field without leaves may be missing: the checkpoint is older than the field.
            fields = vars(targets) if dataclasses.is_dataclass(targets) else None
            older = fields is not None and not fields.keys() <= stored.keys()
            wanted = {name: fields[name] for name in stored} if fields and older else targets
            items = {STATE: ocp.args.StandardRestore(wanted), META: ocp.args.JsonRestore()}
            try:
                found = reader.restore(path, args=ocp.args.Composite(**items))
            except ValueError as error:  # a difference in nodes without leaves
                differences = [one_line(str(error))]
            else:
                state = dataclasses.replace(targets, **found[STATE]) if older else found[STATE]
                return state, found[META]
    raise _misfit(path, differences)


def read_part(path: Path, part: str, template: PyTree | None) -> tuple[PyTree, dict[str, Any]]:
    """One field of the state in numpy arrays, and the metadata; refused if it is missing or empty."""
    handlers = {STATE: ocp.PyTreeCheckpointHandler(), META: ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
        stored = reader.metadata(path).item_metadata[STATE].tree
        if not jax.tree.leaves(stored.get(part)):
            there = ", ".join(sorted(name for name in stored if jax.tree.leaves(stored[name])))
            raise UserError(
                f"The checkpoint of step {path.name} under {path.parent} holds no {part}; it holds {there}."
            )
        shapes = {
            part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored[part])
        }
        differences = [] if template is None else _differences(shapes, {part: template})
        if differences:
            raise _misfit(path, differences)
        how = jax.tree.map(lambda leaf: ocp.RestoreArgs(np.ndarray, leaf.dtype), shapes)
        items = {
            STATE: ocp.args.PyTreeRestore(shapes, restore_args=how, partial_restore=True),
            META: ocp.args.JsonRestore(),
        }
        restored = reader.restore(path, args=ocp.args.Composite(**items))
    found = restored[STATE][part]
    if template is not None:
        found = jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(found))
    return found, restored[META]


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _differences(stored: PyTree, targets: PyTree) -> list[str]:
    """How the leaves stored differ from those asked for, one clause each."""
    here, there = leaf_shapes(targets), leaf_shapes(stored)
    clauses = [f"{name} is not in the checkpoint" for name in here if name not in there]
    clauses += [f"the checkpoint's {name} has no place in it" for name in there if name not in here]
    for name in here:
        if name in there and here[name] != there[name]:
            clauses.append(f"{name} is {there[name]} in the checkpoint and should be {here[name]}")
    return clauses


def _misfit(path: Path, differences: list[str]) -> UserError:
    more = f"; and {len(differences) - 1} more" if len(differences) > 1 else ""
    return UserError(
        f"The checkpoint of step {path.name} under {path.parent} does not fit the state to be "
        f"restored: {differences[0]}{more}."
    )
