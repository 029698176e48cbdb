"""Cores as devices: how many, what the user's choice and a config change, and the same training on all of them."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cait_jax import cores
from cait_jax.train.config import load_config
from cait_jax.train.metrics import read_metrics
from cait_jax.train.setup import mesh_fits

ROOT = Path(__file__).parents[1]
DEVICES = (
    "import jax; from cait_jax.cores import use_cores; use_cores({}); print(jax.device_count())"
)


def machine(monkeypatch, tmp_path, *, siblings, quota=None, memory=2**40):
    """A machine with threads 0, 1, ..., each with the text of its core's threads."""
    for thread, text in enumerate(siblings):
        folder = tmp_path / f"cpu{thread}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text)
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores, "_memory", lambda: memory)
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda pid: set(range(len(siblings))), raising=False
    )


@pytest.fixture
def chosen(monkeypatch):
    """What `use_cores` sets, in a process where nothing is set."""
    values = []

    class Config:
        jax_num_cpu_devices = -1

        def update(self, name, value):
            assert name == "jax_num_cpu_devices"
            values.append(value)

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(cores, "jax", types.SimpleNamespace(config=Config()))
    return values


@pytest.mark.parametrize(
    ("siblings", "quota", "expected"),
    [
        (["0", "1"], None, 2),
        (["0,4", "1,5", "2,6", "3,7"] * 2, None, 4),
        (["0", "1", "2", "3"], "max 100000", 4),
        (["0", "1", "2", "3"], "150000 100000", 2),
        (["0", "1", "2", "3"], "50000 100000", 1),
        (["0", "1", "2", "3"], "nonsense", 4),
    ],
)
def test_cores_are_physical_and_within_the_quota(monkeypatch, tmp_path, siblings, quota, expected):
    machine(monkeypatch, tmp_path, siblings=siblings, quota=quota)
    assert cores.usable_cores() == expected


def test_threads_are_cores_where_the_system_tells_no_topology(monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, siblings=[])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert cores.usable_cores() == 3


@pytest.mark.parametrize(
    ("number", "memory", "fits", "expected"),
    [
        (64, 2**40, lambda devices: True, [8]),
        (8, 2**33, lambda devices: True, [4]),
        (8, 2**40, lambda devices: 30 % devices == 0, [6]),
        (8, 2**40, lambda devices: 31 % devices == 0, []),
        (1, 2**40, lambda devices: True, []),
        (8, 2**30, lambda devices: True, []),
    ],
)
def test_devices_are_at_most_eight_fit_and_have_memory(
    monkeypatch, tmp_path, chosen, number, memory, fits, expected
):
    machine(monkeypatch, tmp_path, siblings=map(str, range(number)), memory=memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)), raising=False)
    cores.use_cores(fits)
    assert chosen == expected


@pytest.mark.parametrize(
    ("overrides", "fitting"),
    [
        ({}, [1, 2, 4, 8]),
        ({"batch_size": "96"}, [1, 2, 3, 4, 6, 8]),
        ({"batch_size": "96", "optimizer.grad_accum": "16"}, [1, 2, 3, 6]),
        ({"mesh.data": "1"}, [1]),
        ({"mesh.fsdp": "2"}, [2, 4, 8]),
        ({"mesh.tensor": "4"}, [4, 8]),
    ],
)
def test_a_config_says_how_many_devices_fit(overrides, fitting):
    config = load_config(str(ROOT / "configs/digits.py"), overrides)
    assert [n for n in range(1, 9) if mesh_fits(config, n)] == fitting


def run(code, **variables):
    free = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    free.pop("JAX_NUM_CPU_DEVICES", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=free | variables, capture_output=True, text=True,
        check=True,
    ).stdout.split()  # fmt: skip


@pytest.mark.slow
def test_what_the_user_sets_counts():
    own = min(cores.usable_cores(), 8)
    assert run(DEVICES.format("")) == [str(own)]
    assert run(DEVICES.format(""), JAX_NUM_CPU_DEVICES="3") == ["3"]
    flag = "--xla_force_host_platform_device_count=5"
    assert run(DEVICES.format(""), XLA_FLAGS=flag) == ["5"]
    assert run(DEVICES.format("lambda devices: devices == 1")) == ["1"]
    assert run(f"import jax; jax.devices(); {DEVICES.format('')}") == ["1"]


@pytest.mark.slow
def test_train_py_trains_on_the_cores_as_on_one_device(tmp_path, compilation_cache):
    losses, devices = [], []
    for name, variables in {"cores": {}, "one": {"JAX_NUM_CPU_DEVICES": "1"}}.items():
        free = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", f"--config={ROOT}/configs/digits.py",
             f"--workdir={tmp_path / name}", "--config.steps=5", "--config.report.every_steps=1"],
            env=free | compilation_cache | variables, capture_output=True, text=True, check=True,
        )  # fmt: skip
        devices += re.findall(r"(\d+) cpu device", done.stderr)
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    fitting = [n for n in range(1, 9) if n <= cores.usable_cores() and 64 % n == 0]
    assert devices == [str(max(fitting)), "1"]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
