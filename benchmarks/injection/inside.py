"""What a process of a run calls before it begins: marks of its progress, and faults at a step."""

import functools
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Where a process can be disturbed.
PLACES = ("data", "step", "save")


def _before(owner: Any, name: str, call: Callable[..., None]) -> None:
    """Has `call` receive the arguments of a function each time before it is called."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, call: Callable[..., None]) -> None:
    """Has `call` receive the arguments and the result each time after a function."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        call(result, *args, **kwargs)
        return result

    setattr(owner, name, wrapped)


class Marks:
    """A file that a run appends its progress to: `step`, `save`, `saved`, `evaluate`, each with a number.

    `saved N` is written once step N is committed. It lies outside of the storage under test.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self) -> None:
        """Has this process write them."""
        from cait_jax.checkpoint import manifest
        from cait_jax.checkpoint.store import Checkpoints
        from cait_jax.train import loop
        from cait_jax.train.setup import Trainer

        stream = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        steps = 0

        def mark(name: str, number: int) -> None:
            os.write(stream, f"{name} {number} {time.monotonic()}\n".encode())

        def step(trainer: Any, state: Any, batch: Any) -> None:
            nonlocal steps
            steps = steps + 1 if steps else int(state.step) + 1
            mark("step", steps)

        _before(Trainer, "train_step", step)
        _before(loop, "_evaluate", lambda *_: mark("evaluate", steps))
        _after(loop, "_evaluate", lambda *_: mark("evaluated", steps))
        _before(Checkpoints, "save", lambda self, number, *_, **__: mark("save", number))
        _after(manifest, "commit", lambda _, directory, *__: mark("saved", int(directory.name)))

    def read(self) -> list[tuple[str, int, float]]:
        """Name, number and moment (seconds of the monotonic clock) of each so far."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")[:-1]
        return [(name, int(number), float(at)) for name, number, at in map(str.split, lines)]

    def wait_for(self, name: str, number: int, children: list[Any], seconds: float = 120) -> bool:
        """Waits until a mark is there; False if a process has ended before, or it took too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if any(mark[:2] == (name, number) for mark in self.read()):
                return True
            if any(child.poll() is not None for child in children):
                return False
            time.sleep(0.001)
        return False


def at(place: str, step: int, fault: Callable[[], None]) -> None:
    """Has `fault` called once in this process: when the batch, the step or the save of a step begins."""
    from cait_jax.checkpoint.store import Checkpoints
    from cait_jax.data.loader import Batches
    from cait_jax.train.setup import Trainer

    taken = 0

    def count(*_: Any, **__: Any) -> None:
        nonlocal taken
        if threading.current_thread() is not threading.main_thread():
            return  # batches of an evaluation, which load ahead
        taken += 1
        if taken == step:
            fault()

    if place == "save":

        def compare(checkpoints: Any, number: int, *_: Any, **__: Any) -> None:
            if number >= step:
                fault()

        _before(Checkpoints, "save", compare)
    elif place == "data":
        _before(Batches, "__next__", count)
    else:
        _before(Trainer, "train_step", count)


def hang() -> None:
    """Sleeps for longer than a trial lasts."""
    time.sleep(3600)


def stop() -> None:
    """Stops this process, as a debugger or a frozen machine does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    """Kills this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """Raises what no program expects."""
    raise RuntimeError("a defect")


def leave() -> None:
    """Ends this process as if all were well."""
    sys.exit(0)


def without_fsync() -> None:
    """Has nothing reach the disk by order: what a trial of power cuts must notice."""
    os.fsync = lambda _: None


def record_resume(path: Path) -> None:
    """Has a run write the bits of the state that it restored and the examples of each step.

    PATH.state receives the SHA-256 of each array, in the first process; PATH.examples.I a line for each batch of
    process I, with the SHA-256 of each of its rows.
    """
    import jax
    from jax.experimental import multihost_utils

    from cait_jax.checkpoint.store import Checkpoints
    from cait_jax.train import loop

    def restored(result: Any, *_: Any, **__: Any) -> None:
        if result is None:
            return
        state = result[1]
        if jax.process_count() > 1:
            state = multihost_utils.process_allgather(state, tiled=True)
        if jax.process_index() == 0:
            path.with_suffix(".state").write_text(json.dumps([result[0], digests(state)]))

    def example(batch: dict[str, np.ndarray], *_: Any) -> None:
        rows = zip(batch["image"], batch["label"], strict=True)
        contents = [image.tobytes() + label.tobytes() for image, label in rows]
        lines = [hashlib.sha256(content).hexdigest()[:16] for content in contents]
        file = path.with_suffix(f".examples.{jax.process_index()}")
        with file.open("a") as stream:
            stream.write(json.dumps(lines) + "\n")

    _after(Checkpoints, "restore", restored)
    _before(loop, "put_batch", example)


def digests(state: Any) -> dict[str, str]:
    """The SHA-256 of each array of a pytree with its dtype and shape, by its path."""
    import jax

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        content = f"{array.dtype} {array.shape} ".encode() + array.tobytes()
        found[jax.tree_util.keystr(path)] = hashlib.sha256(content).hexdigest()
    return found
