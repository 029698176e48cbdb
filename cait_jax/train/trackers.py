"""Metrics and pictures for TensorBoard, Weights & Biases, MLflow and trackio, beside `metrics.jsonl`.

A run that goes on trains the steps after its last checkpoint again, with the same metrics. TensorBoard hides what
was written of them. The others have one run for a workdir: WORKDIR/trackers.json keeps its id and the last row
that was sent. Rows of `metrics.jsonl` after that are sent first, and none is sent twice. A row is noted before it
is sent, so rows that a tracker has not stored when the process is killed are missing there.
"""

import contextlib
import math
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from cait_jax.errors import UserError, one_line
from cait_jax.files import atomic_replace, to_json
from cait_jax.reading import read_json
from cait_jax.train.config import flatten

Picture = UInt8[np.ndarray, "h w 3"]
_PATIENCE_S = 30.0  # at the end of a run, for what is not sent yet


@runtime_checkable
class Tracker(Protocol):
    """What a `MetricWriter` also writes to."""

    def start(self, say: Callable[[str], None], rows: Sequence[Mapping[str, Any]]) -> None:
        """Is called once, before the others: `say` shows a sentence, `rows` are in `metrics.jsonl` already."""

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        """Takes a row of `metrics.jsonl`, written at `now` (seconds since 1970)."""

    def picture(self, step: int, name: str, picture: Picture) -> None:
        """Takes a picture of the state after a step."""

    def flush(self) -> None:
        """Is called before a checkpoint is saved."""

    def close(self) -> None:
        """Ends it."""


def from_config(config: ConfigDict, workdir: Path, start_step: int) -> list[Tracker]:
    """The trackers of `report.*`, for a run that goes on after `start_step`.

    Raises:
      UserError: a package is missing.
    """
    report = config.report
    found: list[Tracker] = []
    if report.tensorboard:
        found.append(_TensorBoard(workdir, start_step))
    for name, open_client in _CLIENTS.items():
        if report[name]:
            if find_spec(name) is None:
                raise UserError(
                    f'--config.report.{name}=True needs the package {name}: pip install "cait-jax[{name}]"'
                )
            found.append(_Remote(name, open_client, workdir, report.project, config))
    return found


class _TensorBoard:
    """Files in WORKDIR/tensorboard."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(
                'TensorBoard files need tensorboardX: pip install "cait-jax[tensorboard]".'
            ) from error
        # Hides what a killed run wrote after its last checkpoint.
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def start(self, say: Callable[[str], None], rows: Sequence[Mapping[str, Any]]) -> None:
        del say, rows  # it has them

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step, walltime=now)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@runtime_checkable
class Client(Protocol):
    """A run at a tracker."""

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        """Sends a row."""

    def picture(self, step: int, name: str, picture: Picture) -> None:
        """Sends a picture."""

    def close(self) -> None:
        """Ends the run."""


class _Remote:
    """A tracker that may be slow or away: a thread sends, and what fails ends the tracker, not the training."""

    def __init__(
        self,
        name: str,
        open_client: Callable[..., Client],
        workdir: Path,
        project: str,
        config: ConfigDict,
    ) -> None:
        self.name = name
        self._open = open_client
        self._workdir = workdir
        self._project = project
        self._config = {key: value for key, value in flatten(config).items() if value is not None}
        self._queue: queue.SimpleQueue[tuple[tuple[int, int], str, tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._run_id, self._sent = read_sent(workdir, name)
        self._thread = threading.Thread(target=self._send, name=name, daemon=True)
        self._say: Callable[[str], None] = print

    def start(self, say: Callable[[str], None], rows: Sequence[Mapping[str, Any]]) -> None:
        self._say = say
        for row in rows:
            values: dict[str, Any] = dict(row)
            step, now = values.pop("step"), values.pop("time")
            numbers = {key: math.nan if value is None else value for key, value in values.items()}
            self.write(step, now, numbers)

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        evaluation = any(key.startswith("eval/") for key in values)
        self._put((step, int(evaluation)), "write", (step, now, dict(values)))

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._put((step, 2), "picture", (step, name, picture))

    def flush(self) -> None:
        """The thread does not wait for checkpoints."""

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._queue.put(None)
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            self._say(
                f"{self.name} has not taken everything within {_PATIENCE_S:.0f} s; metrics.jsonl has it all"
            )

    def _put(self, mark: tuple[int, int], method: str, arguments: tuple[Any, ...]) -> None:
        if mark <= self._sent:
            return
        self._sent = mark
        if self._thread.ident is None:
            self._thread.start()
        self._queue.put((mark, method, arguments))

    def _send(self) -> None:
        try:
            name = f"{self._workdir.absolute().name}-{self._run_id[:6]}"
            client = self._open(self._workdir, self._project, self._run_id, name, self._config)
            with contextlib.closing(client):
                while (item := self._queue.get()) is not None:
                    mark, method, arguments = item
                    note_sent(self._workdir, self.name, self._run_id, mark)
                    getattr(client, method)(*arguments)
        except Exception as error:  # whatever a tracker raises
            self._say(
                f"{self.name} fails and is left out from here on ({one_line(str(error))}); training goes on, and "
                "metrics.jsonl has everything"
            )


_FILE = "trackers.json"
_lock = threading.Lock()


def read_sent(workdir: Path, name: str) -> tuple[str, tuple[int, int]]:
    """The id of a workdir's run at a tracker, a new one if there is none, and the mark of the last row sent."""
    entry = _entries(workdir).get(name)
    with contextlib.suppress(TypeError, KeyError, ValueError):
        step, part = entry["sent"]  # type: ignore[index]
        return str(entry["id"]), (int(step), int(part))  # type: ignore[index]
    return uuid.uuid4().hex, (0, -1)


def note_sent(workdir: Path, name: str, run_id: str, mark: tuple[int, int]) -> None:
    """Notes the mark of a row that is about to be sent."""
    with _lock:
        entries = {**_entries(workdir), name: {"id": run_id, "sent": mark}}
        with atomic_replace(workdir / _FILE) as temporary:
            temporary.write_text(to_json(entries))


def _entries(workdir: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = read_json(workdir / _FILE)
        if isinstance(found, dict):
            return found
    return {}


class _Wandb:
    """`WANDB_MODE=offline` keeps the run in WORKDIR/wandb."""

    def __init__(
        self, workdir: Path, project: str, run_id: str, name: str, config: Mapping[str, Any]
    ) -> None:
        import wandb

        if wandb.setup().settings.mode not in ("offline", "disabled") and not wandb.api.api_key:
            raise ConnectionError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
        self._image = wandb.Image
        self._run: Any = wandb.init(
            project=project, id=run_id, name=name, resume="allow", dir=workdir, config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._run.log({name: self._image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """At `MLFLOW_TRACKING_URI`, by default as MLflow has it; the project is the experiment."""

    def __init__(
        self, workdir: Path, project: str, run_id: str, name: str, config: Mapping[str, Any]
    ) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(project)
        )
        known = self._client.search_runs([experiment_id], f"tags.cait_jax = '{run_id}'")
        if known:
            self._run = known[0].info.run_id
            self._client.set_terminated(self._run, "RUNNING")
        else:
            created = self._client.create_run(
                experiment_id, run_name=name, tags={"cait_jax": run_id}
            )
            self._run = created.info.run_id
            params = [Param(key, str(value)[:500]) for key, value in config.items()]
            for first in range(0, len(params), 100):  # as many as a request may have
                self._client.log_batch(self._run, params=params[first : first + 100])

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        time_ms = int(1000 * now)
        metrics = [self._metric(key, value, time_ms, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._client.log_image(self._run, picture, artifact_file=f"{name}/step_{step}.png")

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Trackio:
    """Local, in `TRACKIO_DIR`, as trackio has it."""

    def __init__(
        self, workdir: Path, project: str, run_id: str, name: str, config: Mapping[str, Any]
    ) -> None:
        del workdir, run_id  # the name has a part of the id
        import trackio

        self._image = trackio.Image
        self._run: Any = trackio.init(
            project=project, name=name, resume="allow", config=dict(config), embed=False
        )

    def write(self, step: int, now: float, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._run.log({name: self._image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


_CLIENTS: Mapping[str, Callable[..., Client]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
