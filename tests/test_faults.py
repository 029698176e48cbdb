"""A trial of each fault of `benchmarks/faults.py`, and what judges it: a judge that sees nothing finds nothing."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from marks import slow_unless

from cait_jax.checkpoint.store import Checkpoints

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import faults
    from injection import inside, runs, states, storage
    from injection.states import Plan, expected_course
finally:
    sys.path.pop(0)

MOUNTS = os.name == "posix" and os.geteuid() == 0 and shutil.which("mkfs.ext4") is not None


@pytest.fixture(scope="module")
def out(tmp_path_factory, compilation_cache):
    """Where the trials write, with the compiled programs of the other tests."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "cache").symlink_to(compilation_cache["JAX_COMPILATION_CACHE_DIR"])
    return folder


def trials(fault, out, count=1):
    """The lines of so many trials, in a process of their own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "benchmarks/faults.py", f"--fault={fault}", f"--trials={count}", f"--out={out}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return faults.read(out / f"{fault}.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "nonfinite", "resume", "signals", "two_starts"])
def test_a_trial_holds(fault, out):
    (line,) = trials(fault, out)
    # How long an end takes is judged on a machine that does nothing else.
    assert not [text for text in line["problems"] if not text.endswith("are allowed")], line


@pytest.mark.slow
@pytest.mark.skipif(not MOUNTS, reason="mounts need root")
def test_a_power_cut_loses_nothing_that_was_saved(out):
    (line,) = trials("power_cut", out)
    assert line["held"], line
    (line,) = trials("unsynced", out)
    assert any("was reported saved, and the newest sound is" in text for text in line["problems"])


def test_bits_that_differ_are_found(tmp_path):
    state = {"w": jnp.zeros(3), "step": jnp.int32(2)}
    same = inside.digests(state)
    assert same == inside.digests({"w": jnp.zeros(3), "step": jnp.int32(2)})
    for other in (jnp.zeros(3).at[1].set(1e-45), jnp.zeros(3).at[0].set(-0.0), jnp.zeros((1, 3))):
        assert inside.digests({**state, "w": other}) != same


@pytest.mark.parametrize("seed", slow_unless(lambda seed: seed < 4, range(12)))
def test_what_is_spoilt_is_found(tmp_path, seed):
    """Every kind of damage on two small runs."""
    for name in ("run", "other"):
        with Checkpoints(tmp_path / name, keep=2) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, {"w": jnp.full(3, float(step + len(name)))}, {"step": step})
    draw = random.Random(seed)
    kind, number, named = states.spoil(draw, tmp_path / "run", 2, tmp_path / "other")
    with states.heard() as messages:
        step, _, _ = Checkpoints(tmp_path / "run").restore({"w": jnp.zeros(3)})
    assert step == 1, kind
    assert any(f"step {number} under" in text and named in text for text in messages), messages


@pytest.mark.parametrize(
    ("at", "skips", "rollbacks", "expected"),
    [
        ((5,), 1, 0, ([5], 0, "finished")),
        ((5, 6), 1, 1, ([5, 6], 1, "finished")),
        ((5, 6), 1, 0, ([5, 6], 0, "NonFiniteError")),
        ((5, 6, 7), 0, 2, ([5, 6, 7], 2, "NonFiniteError")),
        ((3, 5, 7), 1, 0, ([3, 5, 7], 0, "finished")),
    ],
)
def test_the_course_of_steps_that_are_not_finite(at, skips, rollbacks, expected):
    assert expected_course(Plan("loss", at, 0.0, skips, rollbacks), 16) == expected


def test_marks_are_read_while_they_are_written(tmp_path):
    marks = inside.Marks(tmp_path / "marks")
    assert marks.read() == []
    marks.path.write_text("step 1 0.5\nsave 3 0.75\nsav")
    assert marks.read() == [("step", 1, 0.5), ("save", 3, 0.75)]
    assert marks.wait_for("save", 3, [])


def test_the_table_counts_what_held(tmp_path):
    lines = [
        {"fault": "kill", "trial": 0, "problems": [], "held": True},
        {"fault": "kill", "trial": 1, "problems": ["x", "y"], "held": False},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "kill.jsonl").write_text(text + '{"fault": "ki')
    rows = faults.report(tmp_path).splitlines()
    assert rows[2].split("|")[1:4] == [" kill    ", "        2 ", "      1 "]
    assert rows[-1] == "kill, 1 times: x; y"


def test_files_that_no_run_leaves_are_named(tmp_path):
    for name in ("checkpoints/3", "checkpoints/9.orbax-checkpoint-tmp", "checkpoints/broken"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("metrics.jsonl", "checkpoints/run.json", ".shared-1", "lock.json"):
        (tmp_path / name).touch()
    assert runs.strangers(tmp_path) == [
        f"{name} was left in the workdir"
        for name in (".shared-1", "lock.json", "checkpoints/9.orbax-checkpoint-tmp")
    ]


REFUSED = """
import os, struct, sys
from pathlib import Path
place, control = map(Path, sys.argv[1:])
def answers():
    found = []
    for call in (
        lambda: (place / "a").write_text("x"),
        lambda: os.mkdir(place / f"d{len(list(place.iterdir()))}"),
        lambda: os.fsync(opened),
        lambda: (place / "there").read_text(),
        lambda: Path(control).with_name("outside").write_text("x"),
    ):
        try:
            call()
            found.append(0)
        except OSError as error:
            found.append(error.errno)
    return found
(place / "there").write_text("x")
opened = os.open(place / "there", os.O_RDWR)
print(answers())
for code in (30, 5, 0):
    with control.open("r+b") as stream:
        stream.write(struct.pack("i", code))
    print(answers())
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_storage_refuses_below_its_folder_alone(tmp_path):
    place, control = tmp_path / "place", tmp_path / "control"
    place.mkdir()
    control.write_bytes(bytes(4))
    library = storage.build(tmp_path)
    environment = os.environ | {
        "LD_PRELOAD": str(library), "FAULT_CONTROL": str(control), "FAULT_PREFIX": f"{place}/"
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", REFUSED, str(place), str(control)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.splitlines() == [
        "[0, 0, 0, 0, 0]", "[30, 30, 30, 0, 0]", "[5, 5, 5, 5, 0]", "[0, 0, 0, 0, 0]"
    ]  # fmt: skip
