"""One run in several real processes: each reads its share of every batch, all go on after a kill."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from run_files import untimed
from tfds_files import numbered_jpeg, write_imagenet2012
from trees import assert_same_bits

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.train.report import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 8
CHILD = textwrap.dedent("""
    import sys
    import jax

    if __name__ == "__main__":
        workdir, data_dir, workers, index, count, address = sys.argv[1:]
        if int(count) > 1:
            jax.distributed.initialize(
                address, int(count), int(index), coordinator_bind_address=address,
                heartbeat_timeout_seconds=20, shutdown_timeout_seconds=30,
            )
        assert jax.device_count() == 2

        from cait_jax.train import train
        from configs import common

        config = common.get_config()
        config.model.name = "cait_nano4_patch4_8"
        config.model.depth, config.model.width, config.model.num_heads = 1, 16, 2
        config.model.dropout = 0.1
        config.image_size = 16
        config.batch_size = 8
        config.steps = %d
        config.data.data_dir = data_dir
        config.data.workers = int(workers)
        config.augment.rand_augment = ""
        config.augment.color_jitter = 0.4
        config.optimizer.learning_rate = 1e-2
        config.optimizer.ema_decay = 0.9
        config.eval.batch_size = 4
        config.eval.every_epochs = 1.0
        config.checkpoint.every_steps = 2
        config.report.every_steps = 1
        train(config, workdir)
""") % STEPS  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    jpegs = [(numbered_jpeg(number, 30, 40), number) for number in range(42)]
    write_imagenet2012(directory, {"train": jpegs[:31], "validation": jpegs[31:]})
    return directory


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(environment, workdir, data_dir, *, processes, workers=0):
    """Starts a run on two devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={2 // processes}"
    command = [sys.executable, "-c", CHILD, str(workdir), str(data_dir), str(workers)]
    return [
        subprocess.Popen(
            [*command, str(index), str(processes), address],
            cwd=ROOT,
            env=environment | {"XLA_FLAGS": flags},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes):
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said


def test_two_processes_read_and_learn_what_one_does_and_resume(tmp_path, environment, data_dir):
    """Also with decoding in other processes, and after all of them were killed between two checkpoints."""
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(environment, one, data_dir, processes=1))

    killed = start(environment, two, data_dir, processes=2, workers=1)
    while all(process.poll() is None for process in killed):
        rows = read_metrics(two / "metrics.jsonl")
        if rows and rows[-1]["step"] >= 4:
            break
        time.sleep(0.001)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    reached = Checkpoints(two / "checkpoints").latest_step()
    assert reached is not None
    assert reached < STEPS

    finish(start(environment, two, data_dir, processes=2))
    assert untimed(two) == untimed(one)
    assert [row["step"] for row in untimed(one) if "train/loss" in row] == list(range(1, STEPS + 1))
    for part in ("params", "ema", "opt_state"):
        step, expected, _ = Checkpoints(one / "checkpoints").restore_part(part)
        step_of_two, found, _ = Checkpoints(two / "checkpoints").restore_part(part)
        assert step == step_of_two == STEPS
        assert_same_bits(found, expected)
    assert np.isfinite(untimed(one)[-1]["eval/loss"])
