"""Trials of real runs: killed, cut off, out of space, disturbed by a partner or a signal, resumed, started twice.

Each function injects one fault and gives what it injected, what it observed, and the problems: what should have
held and did not.
"""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from injection import inside, storage
from injection.inside import Marks
from injection.launch import Child, wait
from injection.runs import (
    EVERY,
    RUN_S,
    STEPS,
    Bench,
    Reference,
    committed,
    compare_finished,
    compare_newest,
    finish,
    options,
    restored,
    untimed,
)

EVALUATIONS = (5, 10, 15, 16)
SAVES = sorted({*range(EVERY, STEPS + 1, EVERY), *EVALUATIONS})


@dataclasses.dataclass
class Outcome:
    """Of a trial.

    Attributes:
      injected: what was done, and when.
      observed: what the run did.
      problems: what should have held, in words.
    """

    injected: dict[str, Any]
    observed: dict[str, Any]
    problems: list[str]


def moment(draw: random.Random, phase: str) -> tuple[str, int]:
    """A mark of the phase to wait for."""
    if phase == "save":
        return "save", draw.choice(SAVES[:-1])
    if phase == "evaluation":
        return "evaluate", draw.choice(EVALUATIONS[:-1])
    return "step", draw.randrange(1, STEPS)


def delay(draw: random.Random, phase: str, reference: Reference) -> float:
    """Seconds after the mark: anywhere in the phase."""
    if phase == "start":
        return draw.uniform(0, reference.start_s)
    if phase == "step":
        return draw.uniform(0, 0.01)
    marks = reference.marks()
    begins = {"save": "save", "evaluation": "evaluate"}[phase]
    ends = {"save": "saved", "evaluation": "evaluated"}[phase]
    usual = statistics.median(
        end[2] - begin[2]
        for begin in marks
        for end in marks
        if (begin[0], end[0]) == (begins, ends) and begin[1] == end[1]
    )
    return draw.uniform(0, usual)


def reach(
    draw: random.Random, phase: str, reference: Reference, marks: Marks, children: list[Child]
) -> dict[str, Any]:
    """Waits until a run is somewhere in the phase; says where that is."""
    where: dict[str, Any] = {"phase": phase}
    if phase != "start":
        mark, number = moment(draw, phase)
        where["mark"] = f"{mark} {number}"
        marks.wait_for(mark, number, children)
    where["after_s"] = round(delay(draw, phase, reference), 4)
    deadline = time.monotonic() + where["after_s"]
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))
    return where


def end(children: list[Child]) -> None:
    """Kills what still runs."""
    for child in children:
        child.send(signal.SIGKILL)
    wait(children, RUN_S)


START_S = 20  # for the other process


def kill(bench: Bench, draw: random.Random, folder: Path) -> Outcome:
    """kill -9 of the run, or of one of its two processes."""
    processes = draw.choice([1, 1, 2])
    reference = bench.reference(processes=processes)
    workdir, marks = folder / "run", Marks(folder / "marks")
    children = bench.launcher.start(
        options(workdir, watchdog__start_seconds=START_S),
        folder / "log",
        processes=processes,
        hooks={0: marks.install},
    )
    phase = draw.choice(["start", "step", "evaluation", "save", "save", "save"])
    where = reach(draw, phase, reference, marks, children)
    victim = draw.randrange(processes)
    children[victim].send(signal.SIGKILL)
    problems = []
    # Before the processes have met, the other waits for it to start.
    wait(children, START_S + 10)
    after = max(child.ended or time.monotonic() for child in children) - children[victim].ended
    if (phase == "start" and after > START_S + 2) or (phase != "start" and after > 1):
        problems.append(f"the other process ended {after:.1f} s later")
    if processes == 2 and f"process {victim}" not in children[1 - victim].said():
        problems.append("the other process did not name it")
    end(children)
    found = committed(workdir)
    step, differing = bench.check(compare_newest, workdir, reference)
    problems += differing
    problems += finish(bench, workdir, folder / "again", reference, processes=processes)
    return Outcome(
        {"processes": processes, "process": victim, **where},
        {
            "status": [child.status for child in children],
            "committed": found,
            "seconds": round(after, 3),
            "restored": step,
            "last_mark": (marks.read() or [None])[-1],
        },
        problems,
    )


def unsynced(bench: Bench, draw: random.Random, folder: Path) -> Outcome:
    """A power cut of a run whose `os.fsync` does nothing, which the trial must notice."""
    return power_cut(bench, draw, folder, sync=False)


def power_cut(bench: Bench, draw: random.Random, folder: Path, *, sync: bool = True) -> Outcome:
    """The image of the file system under a run, copied at a random moment: what a power cut leaves."""
    reference = bench.reference()
    marks = Marks(folder / "marks")

    def install() -> None:
        if not sync:
            inside.without_fsync()
        marks.install()

    with storage.loop(folder / "disk.img", folder / "disk") as disk:
        workdir = disk / "run"
        children = bench.launcher.start(options(workdir), folder / "log", hooks={0: install})
        phase = draw.choice(["save", "save", "save", "evaluation", "step"])
        where = reach(draw, phase, reference, marks, children)
        reported = [number for name, number, _ in marks.read() if name == "saved"]
        written = untimed(workdir) if (workdir / "metrics.jsonl").exists() else []
        tries = storage.copy_image(folder / "disk.img", folder / "cut.img")
        end(children)
    with storage.loop(folder / "cut.img", folder / "cut") as disk:
        workdir = disk / "run"
        found = committed(workdir)
        step, problems = bench.check(compare_newest, workdir, reference)
        newest = max(reported, default=None)
        if newest is not None and (step is None or step < newest):
            problems.append(f"step {newest} was reported saved, and the newest sound is {step}")
        rows = untimed(workdir) if (workdir / "metrics.jsonl").exists() else []
        if newest is not None and [row for row in rows if row["step"] < newest] != [
            row for row in written if row["step"] < newest
        ]:
            problems.append(f"lines of metrics.jsonl before step {newest} are lost")
        problems += finish(bench, workdir, folder / "again", reference)
    for name in ("disk.img", "cut.img"):
        (folder / name).unlink()
    return Outcome(
        where,
        {"reported": reported, "committed": found, "restored": step, "copies": tries},
        problems,
    )


RETRY_S = 10  # in which the last save is tried again


def disk(bench: Bench, draw: random.Random, folder: Path) -> Outcome:
    """Storage that is full, over its quota or read-only, or raises, from a random moment on."""
    reference = bench.reference()
    kind = draw.choice(["full", "quota", "read_only", "raises"])
    passes = draw.random() < 0.7
    lasts = draw.uniform(0.05, 1.5) if passes else None
    marks = Marks(folder / "marks")
    where: dict[str, Any] = {"kind": kind, "lasts_s": lasts and round(lasts, 3)}
    with storage.tmpfs(bench.out / "mounted") as place:
        workdir = place / "run"
        fault = storage.Fault(bench.out, place, kind)
        children = bench.launcher.start(
            options(workdir, checkpoint__retry_seconds=RETRY_S),
            folder / "log",
            hooks={0: marks.install},
        )
        phase = draw.choice(["start", "step", "save", "save", "evaluation"])
        where |= reach(draw, phase, reference, marks, children)
        before = committed(workdir)
        fault.begin()
        if lasts is not None:
            wait(children, lasts)
            fault.end()
        ended = wait(children, RUN_S)
        end(children)
        fault.end()
        (child,) = children
        said, problems = child.said(), []
        if not ended:
            problems.append(f"the run did not end in {RUN_S:.0f} s")
        if "Traceback" in said:
            problems.append("a traceback was printed")
        found = committed(workdir)
        step, differing = bench.check(compare_newest, workdir, reference)
        problems += differing
        if before and (step is None or step < before[-1]):
            problems.append(f"step {before[-1]} was good, and is {step} after the fault")
        last_saved = bool(found) and found[-1] == STEPS
        if child.status == 0 and not last_saved:
            problems.append("the run ended with 0 and its last step is not saved")
        if child.status != 0 and passes and phase != "start":
            problems.append("the storage came back, and the run had ended")
        if child.status != 0 and not said.strip().splitlines()[-1:][0].startswith("train.py: "):
            problems.append("the last line is no sentence")
        if child.status == 0:
            problems += bench.check(compare_finished, workdir, reference)
        else:
            problems += finish(bench, workdir, folder / "again", reference)
    failures = [line for line in said.splitlines() if "failed" in line or "cannot" in line]
    return Outcome(
        where,
        {
            "status": child.status,
            "before": before,
            "committed": found,
            "restored": step,
            "said": failures[:3],
        },
        problems,
    )


# What one of two processes does, and where; of the others it is a death that they notice.
CULPRITS = {
    "killed in data": (inside.kill, "data"),
    "killed in step": (inside.kill, "step"),
    "killed in save": (inside.kill, "save"),
    "raises": (inside.fail, "step"),
    "raises in save": (inside.fail, "save"),
    "exits": (inside.leave, "step"),
    "stopped": (inside.stop, "step"),
    "hung in data": (inside.hang, "data"),
    "hung in step": (inside.hang, "step"),
    "hung in save": (inside.hang, "save"),
    "never started": (None, ""),
}
DEATHS = (inside.kill, inside.fail, inside.leave)
# Of the trial: short, and still longer than what such a run takes for anything on a machine with other work.
WATCHDOG = {"watchdog__seconds": 20, "watchdog__factor": 3, "watchdog__start_seconds": 60}
ALLOWED = re.compile(
    r"where (\d+) s are allowed|not answered for (\d+) s|did not start within (\d+) s"
)


def processes(
    bench: Bench, draw: random.Random, folder: Path, *, kind: str | None = None
) -> Outcome:
    """One of two processes dies, hangs, or never starts; `kind` is one of `CULPRITS`, drawn if None."""
    if kind is None:
        kind = draw.choice(list(CULPRITS))
    if kind not in CULPRITS:
        raise SystemExit(f"--kind is one of: {', '.join(CULPRITS)}")
    reference = bench.reference(processes=2)
    fault, place = CULPRITS[kind]
    culprit = draw.randrange(2)
    step = draw.randrange(7, STEPS)  # the first of each phase may last `start_seconds`
    workdir, happened = folder / "run", folder / "happened"
    marks = Marks(folder / "marks")

    def install() -> None:
        def now() -> None:
            happened.write_text(str(time.monotonic()))
            fault()

        inside.at(place, step, now)

    hooks = {culprit: install} if fault else {}
    if culprit != 0:
        hooks[0] = marks.install
    began = time.monotonic()
    children = bench.launcher.start(
        options(workdir, **WATCHDOG),
        folder / "log",
        processes=2,
        hooks=hooks,
        only=None if fault else [1 - culprit],
    )
    others = [child for index, child in enumerate(children) if not fault or index != culprit]
    ended = wait(others, 120)
    at = float(happened.read_text()) if happened.exists() else began
    seconds = max(child.ended for child in others) - at if ended else None
    said = "\n".join(child.said() for child in others)
    status = [child.poll() for child in children]
    end(children)
    problems = []
    allowed = [int(number) for numbers in ALLOWED.findall(said) for number in numbers if number]
    limit = 1.0 if fault in DEATHS else min(allowed, default=0) + 2.0
    if fault and not happened.exists():
        problems.append("the run ended before the fault")
    elif seconds is None:
        problems.append("the other process waited for more than 120 s")
    elif seconds > limit:
        problems.append(
            f"the other process ended {seconds:.1f} s later, and {limit:.0f} are allowed"
        )
    if f"process {culprit}" not in said:
        problems.append("the other process did not name the culprit")
    if ended and any(child.status == 0 for child in others):
        problems.append("the other process ended with 0")
    step_now, differing = bench.check(compare_newest, workdir, reference)
    problems += differing
    problems += finish(bench, workdir, folder / "again", reference, processes=2)
    return Outcome(
        {"kind": kind, "process": culprit, "step": step if fault else None},
        {
            "status": status,
            "seconds": seconds and round(seconds, 3),
            "said": said.strip().splitlines()[-1:],
            "restored": step_now,
        },
        problems,
    )


def signals(bench: Bench, draw: random.Random, folder: Path) -> Outcome:
    """SIGTERM, SIGINT or SIGUSR1 to one process, to all, or to the group."""
    count = draw.choice([1, 2])
    number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    target = draw.choice(["one", "all", "group"])
    phase = draw.choice(["start", "step", "evaluation", "save"])
    reference = bench.reference(processes=count)
    workdir, marks = folder / "run", Marks(folder / "marks")
    fresh = phase == "start"  # with the time that imports take
    children = bench.launcher.start(
        options(workdir, **WATCHDOG),
        folder / "log",
        processes=count,
        hooks={0: marks.install},
        fresh=fresh,
    )
    where = reach(draw, phase, reference, marks, children)
    at_step = max((mark[1] for mark in marks.read() if mark[0] == "step"), default=0)
    began = time.monotonic()
    if target == "group":
        os.killpg(children[0].pid, number)
    else:
        for child in children if target == "all" else [draw.choice(children)]:
            child.send(number)
    ended = wait(children, RUN_S if number == signal.SIGUSR1 else 120)
    seconds = max(child.ended for child in children) - began
    end(children)
    status = [child.status for child in children]
    said = children[0].said()
    problems = []
    goes_on = number == signal.SIGUSR1 and count == 1
    right = {0} if goes_on else {130}
    if phase == "start":
        right |= {130, -number}  # before the run has begun, the signal may end it
        if count == 2 and target == "one":
            right.add(1)  # of the process that waits for it, for `start_seconds`
    # JAX notices a signal within a second, and all agree on a step after that: such a short run may be done.
    finished = set(status) == {0} and (count == 2 or at_step >= STEPS - 2)
    if finished:
        right = {0}
    if not ended:
        problems.append("a process did not end")
    elif not goes_on and phase != "start" and seconds > (limit := reference.pause_s + 2):
        problems.append(f"the end came {seconds:.1f} s later, and {limit:.1f} are allowed")
    if not right.issuperset(status):
        problems.append(f"the exit statuses are {status}")
    if "Traceback" in "".join(child.said() for child in children):
        problems.append("a traceback was printed")
    saved = [mark for mark in marks.read() if mark[0] == "saved"]
    if phase != "start" and not any(
        mark[1] in range(at_step, at_step + 3) and mark[2] > began for mark in saved
    ):
        problems.append(f"no step was saved at or soon after step {at_step}")
    found = committed(workdir)
    if (
        not goes_on
        and not finished
        and phase != "start"
        and f"stopped after step {found[-1]} of" not in said
    ):
        problems.append("it does not say after which step it stopped, or did not save that")
    if set(status) == {0}:
        problems += bench.check(compare_finished, workdir, reference)
    else:
        _, differing = bench.check(compare_newest, workdir, reference)
        problems += differing
        problems += finish(bench, workdir, folder / "again", reference, processes=count)
    return Outcome(
        {"processes": count, "signal": number.name, "to": target, **where},
        {
            "status": status,
            "at_step": at_step,
            "committed": found,
            "seconds": round(seconds, 3),
            "said": said.strip().splitlines()[-1:],
        },
        problems,
    )


# How many processes with how many devices each, and the settings of a run that trains the same on all of them.
SHAPES: dict[str, dict[str, Any]] = {
    "one device": {},
    "data 2": {"devices": 2},
    "fsdp 2": {"devices": 2, "mesh__data": 1, "mesh__fsdp": 2},
    "tensor 2": {"devices": 2, "mesh__data": 1, "mesh__tensor": 2},
    "data, fsdp, tensor 2": {"devices": 8, "mesh__fsdp": 2, "mesh__tensor": 2},
    "2 processes": {"processes": 2},
    "2 processes, fsdp 2": {"processes": 2, "mesh__data": 1, "mesh__fsdp": 2},
    "2 workers": {"data__workers": 2},
}
WIDE = {"model__dtype": "float64", "model__param_dtype": "float64"}
WIDE_SHAPES = ("one device", "fsdp 2", "2 processes")
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def resume(bench: Bench, draw: random.Random, folder: Path) -> Outcome:
    """A run goes on elsewhere: other meshes, numbers of processes and of workers, from any step."""
    wide = draw.random() < 0.25
    before, after = draw.sample(WIDE_SHAPES if wide else list(SHAPES), 2)
    data = {
        "data__name": pictures(bench.out / "pictures"),
        "data__eval_split": "val",
        "data__mean": "0.5,0.5,0.5",
        "data__std": "0.5,0.5,0.5",
        "eval__every_epochs": 100,
        **(WIDE if wide else {}),
    }
    old = bench.reference(**SHAPES[before], **data)
    step = draw.randrange(1, STEPS)
    workdir = folder / "run"
    workdir.mkdir()
    for number in committed(old.workdir):
        if number <= step:
            source = old.workdir / "checkpoints" / str(number)
            shutil.copytree(source, workdir / "checkpoints" / str(number))
    shutil.copy(old.workdir / "checkpoints" / "run.json", workdir / "checkpoints")
    lines = (old.workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines = [line for line in lines if json.loads(line)["step"] <= step]
    (workdir / "metrics.jsonl").write_text("".join(lines))

    shape = dict(SHAPES[after])
    count = shape.pop("processes", 1)
    record = functools.partial(inside.record_resume, folder / "resume")
    children = bench.launcher.start(
        options(workdir, **data, **shape_settings(shape)),
        folder / "log",
        processes=count,
        devices=shape.get("devices", 1),
        hooks=dict.fromkeys(range(count), record),
        environment={"JAX_ENABLE_X64": "1"} if wide else {},
    )

    def losses(where: Path) -> dict[int, float]:
        return {row["step"]: row["train/loss"] for row in untimed(where) if "train/loss" in row}

    deadline = time.monotonic() + RUN_S
    while step + 1 not in losses(workdir) and time.monotonic() < deadline:
        if any(child.poll() is not None for child in children):
            break
        time.sleep(0.01)
    end(children)
    difference: float | None = None
    problems = []
    if step + 1 not in losses(workdir):
        said = [child.said().strip().splitlines()[-1:] for child in children]
        problems.append(f"it did not go on: {said}")
    else:
        expected = losses(old.workdir)[step + 1]
        difference = abs(losses(workdir)[step + 1] - expected) / abs(expected)
        if difference > (limit := TOLERANCE["float64" if wide else "float32"]):
            problems.append(
                f"the first loss differs by {difference:.1e}, and {limit:.0e} is allowed"
            )
        restored_step, found = json.loads((folder / "resume.state").read_text())
        _, state = bench.check(restored, old.workdir, old.settings, step)
        differing = [path for path in state if found.get(path) != state[path]]
        if restored_step != step or differing:
            problems.append(f"step {restored_step} restored, {len(differing)} arrays differ")
        if (
            examples(folder, count)[0]
            != examples(old.folder, SHAPES[before].get("processes", 1))[step]
        ):
            problems.append("the first batch has other examples")
    return Outcome(
        {"from": before, "to": after, "step": step, "dtype": "float64" if wide else "float32"},
        {"loss_differs": difference},
        problems,
    )


def shape_settings(shape: dict[str, Any]) -> dict[str, Any]:
    """Of a shape what is a key of the config."""
    return {key: value for key, value in shape.items() if "__" in key}


def examples(folder: Path, processes: int) -> list[list[str]]:
    """The rows of each global batch that a run recorded."""
    files = [folder / f"resume.examples.{index}" for index in range(processes)]
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[row for part in batch for row in part] for batch in zip(*parts, strict=False)]


def pictures(folder: Path) -> Path:
    """The digits as a folder of PNG files, which are decoded by threads or by workers."""
    if not folder.exists():
        from PIL import Image
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        made = folder.with_name("pictures.tmp")
        for number, (image, label) in enumerate(zip(images[:300], labels[:300], strict=True)):
            split = made / ("val" if number >= 200 else "train") / str(label)
            split.mkdir(parents=True, exist_ok=True)
            levels = (image.reshape(8, 8) * 15.9).astype("uint8")
            Image.fromarray(levels).resize((16, 16)).save(split / f"{number}.png")
        made.rename(folder)
    return folder


def two_starts(bench: Bench, draw: random.Random, folder: Path) -> Outcome:
    """The same workdir given to two runs, of the same config or of another seed."""
    seeds = draw.choice([[0, 0], [0, 1]])
    settings = [{"seed": seed} if seed else {} for seed in seeds]
    references = [bench.reference(**given) for given in settings]
    later = draw.choice([0.0, draw.uniform(0, 0.2), draw.uniform(0, references[0].seconds / 2)])
    workdir = folder / "run"
    children: list[Child] = []
    for index, given in enumerate(settings):
        children += bench.launcher.start(options(workdir, **given), folder / f"log{index}")
        if index == 0:
            time.sleep(later)
    ended = wait(children, RUN_S)
    end(children)
    problems = [] if ended else ["a run did not end"]
    status = [child.status for child in children]
    said = [child.said().strip().splitlines()[-1:] for child in children]
    if sorted(status) != [0, 1]:
        problems.append(f"the exit statuses are {status}")
    else:
        if " is in use by process " not in str(said[status.index(1)]):
            problems.append("the refused run does not name the other")
        problems += bench.check(compare_finished, workdir, references[status.index(0)])
    return Outcome(
        {"seeds": seeds, "later_s": round(later, 3)}, {"status": status, "said": said}, problems
    )
