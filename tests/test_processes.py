"""The sentence as a program's last line. One run in several real processes: each reads its share of every batch,
all go on after a kill.
"""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from marks import slow
from run_files import WRITES_NO_CACHE, untimed
from tfds_files import numbered_jpeg, write_imagenet2012
from trees import assert_same_bits

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.processes import explain, join_processes
from cait_jax.rendezvous import Meeting
from cait_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 8
SETTINGS = {
    "model.name": "cait_nano4_patch4_8",
    "model.depth": 1,
    "model.class_depth": 1,
    "model.width": 16,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "image_size": 16,
    "batch_size": 8,
    "steps": STEPS,
    "augment.rand_augment": "",
    "augment.color_jitter": 0.4,
    "optimizer.learning_rate": 1e-2,
    "optimizer.ema_decay": 0.9,
    "eval.batch_size": 4,
    "checkpoint.every_steps": 2,
    "report.every_steps": 1,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    jpegs = [(numbered_jpeg(number, 30, 40), number) for number in range(42)]
    write_imagenet2012(directory, {"train": jpegs[:31], "validation": jpegs[31:]})
    return directory


@pytest.fixture(scope="module")
def environment(compilation_cache):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
        **compilation_cache,
    }


def start(environment, workdir, data_dir, *, processes, last=(), **settings):
    """Starts a run on two devices in all; the arguments `last` are the last process's alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = SETTINGS | {"data.data_dir": str(data_dir)} | settings
    command = [sys.executable, "train.py", "--config=configs/cait_xs24.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in given.items()]
    if processes > 1:
        command += [f"--coordinator={address}", f"--processes={processes}"]
    flags = f"--xla_force_host_platform_device_count={2 // processes}"
    return [
        subprocess.Popen(
            [
                *command,
                *([f"--process={index}"] if processes > 1 else []),
                *(last if index == processes - 1 else ()),
            ],
            cwd=ROOT,
            env=environment | {"XLA_FLAGS": flags},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def wait_for(workdir, step, processes):
    """Waits until a run has come so far, or has ended."""
    while all(process.poll() is None for process in processes):
        rows = read_metrics(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            break
        time.sleep(0.005)


def finish(processes, status=0):
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), said
    return said


@pytest.mark.slow
def test_two_processes_read_and_learn_what_one_does_and_resume(tmp_path, environment, data_dir):
    """Stopped by a SIGTERM to one of them, then killed; once with decoding in yet other processes."""
    divided = {"mesh.data": 1, "mesh.fsdp": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(environment, one, data_dir, processes=1, **divided))

    stopped = start(environment, two, data_dir, processes=2, **divided)
    wait_for(two, 1, stopped)
    stopped[1].send_signal(signal.SIGTERM)
    said = finish(stopped, status=130)
    assert "the same command goes on from there" in said[0]
    assert "loss" not in said[1]  # process 0 speaks for all

    killed = start(
        environment | WRITES_NO_CACHE, two, data_dir, processes=2, **{"data.workers": 1}, **divided
    )
    reached = Checkpoints(two / "checkpoints").latest_step()
    wait_for(two, reached + 2, killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    reached = Checkpoints(two / "checkpoints").latest_step()
    assert reached < STEPS

    finish(start(environment, two, data_dir, processes=2, **divided))
    assert untimed(two) == untimed(one)
    steps = [row["step"] for row in untimed(one) if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    for part in ("params", "ema", "opt_state"):
        step, expected, _ = Checkpoints(one / "checkpoints").restore_part(part)
        step_of_two, found, _ = Checkpoints(two / "checkpoints").restore_part(part)
        assert step == step_of_two == STEPS
        assert_same_bits(found, expected)
    assert np.isfinite(untimed(one)[-1]["eval/loss"])


@pytest.mark.slow
def test_two_processes_learn_without_labels_what_one_does(tmp_path, environment, data_dir):
    without = {
        "objective": "dino", "steps": 4, "augment.mixup": 0, "augment.cutmix": 0, "augment.reprob": 0,
        "optimizer.ema_decay": 0, "dino.local_crops": 2, "dino.local_size": 8, "dino.head_hidden": 16,
        "dino.bottleneck": 8, "dino.out_dim": 16,
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    for workdir, count in ((one, 1), (two, 2)):
        finish(start(environment, workdir, data_dir, processes=count, **without))
    assert untimed(two) == untimed(one)
    assert untimed(one)[-1].keys() >= {"eval/knn_accuracy", "eval/feature_rank"}
    for part in ("params", "carried"):
        (_, expected, _), (_, found, _) = (
            Checkpoints(workdir / "checkpoints").restore_part(part) for workdir in (one, two)
        )
        assert_same_bits(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(
    tmp_path, environment, data_dir, number
):
    stopped = start(environment, tmp_path, data_dir, processes=2)
    wait_for(tmp_path, 1, stopped)
    stopped[1].send_signal(number)
    said = finish(stopped, status=130)
    assert "the same command goes on from there" in said[0]
    assert Checkpoints(tmp_path / "checkpoints").latest_step() >= 1


@pytest.mark.slow
def test_a_process_that_fails_takes_the_others_with_it(tmp_path, environment, data_dir):
    """One finds no data and says so. The other, which would wait for it for ever, ends too."""
    processes = start(
        environment, tmp_path, data_dir, processes=2, last=["--config.data.data_dir=/nowhere"]
    )
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert "imagenet2012" in said[1]
    assert "Traceback" not in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_who_outlives_a_killed_process_names_it_in_one_sentence(
    tmp_path, environment, data_dir, killed
):
    processes = start(environment | WRITES_NO_CACHE, tmp_path, data_dir, processes=2, steps=100_000)
    wait_for(tmp_path, 1, processes)
    processes[killed].kill()
    processes[killed].communicate()
    said = processes[1 - killed].communicate(timeout=60)[1]
    assert processes[1 - killed].returncode == 1
    *before, last = said.splitlines()
    assert last.startswith(
        f"train.py: process {killed} on {socket.gethostname()} has ended, last in "
    )
    assert last.endswith("the same command, in all processes, goes on from the last checkpoint")
    own = ("[Gloo]", "cait_nano4", "step")
    assert not [line for line in before if not line.startswith(own) and "sampler.py" not in line]


@pytest.mark.parametrize("bind", [None, "[::]:8476"])
def test_the_coordination_service_binds_the_address_that_process_0_listens_at(monkeypatch, bind):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    if bind:
        monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", bind)
    given, met = {}, {}

    def meet(*arguments, **options):
        met.update(options, arguments=arguments)
        return Meeting({}, {}, ("10.0.0.1", 9000), "10.0.0.1")

    monkeypatch.setattr("cait_jax.rendezvous.meet", meet)
    monkeypatch.setattr("cait_jax.processes._exit_on_uncaught_exceptions", lambda: None)
    monkeypatch.setattr("cait_jax.processes._peers", None)
    monkeypatch.setattr(
        "jax.distributed.initialize",
        lambda address, *_, **options: given.update(options, address=address),
    )
    join_processes(address="10.0.0.1:8476", count=2, index=0)
    assert met["arguments"][:4] == ("10.0.0.1", 8476, 2, 0)
    assert met["bind"] == (bind and "::")
    assert given["address"] == given["coordinator_bind_address"] == "10.0.0.1:9000"


JOINS = """
import sys
import jax
from cait_jax.processes import join_processes, peers

join_processes()
print(jax.process_index(), jax.process_count(), peers().name(1 - jax.process_index()))
"""


@pytest.mark.slow
def test_processes_of_a_slurm_step_find_each_other(environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=environment | step | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
        )
        for index in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[0] for process in processes]
    host = socket.gethostname()
    assert said == [f"0 2 process 1 on {host}\n", f"1 2 process 0 on {host}\n"]
    assert [process.returncode for process in processes] == [0, 0]


DEFECT = """
import sys
import jax
from cait_jax.errors import quiet_libraries
from cait_jax.processes import end_program, join_processes

def main():
    index = int(sys.argv[2])
    join_processes(address=sys.argv[1], count=2, index=index, heartbeat_seconds=5)
    if index == 1:
        raise RuntimeError("a defect")
    jax.experimental.multihost_utils.sync_global_devices("for ever")

quiet_libraries()
try:
    main()
except BaseException as error:
    end_program("prog", error, ())
"""


@pytest.mark.slow
def test_a_defect_in_one_process_keeps_its_traceback_and_ends_all(environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DEFECT, address, str(index)],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert said[1].splitlines()[-1] == "RuntimeError: a defect"
    assert "Traceback" in said[1]
    assert (
        f"process 1 on {socket.gethostname()} has ended, last in its start"
        in said[0].splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--coordinator=127.0.0.1:1"], "belong together: give all three"),
        slow(["--coordinator=here", "--processes=2", "--process=0"], "a host and a port"),
        slow(["--coordinator=h:1", "--processes=2", "--process=2"], "counts from 0"),
        (["--distributed"], "nothing here says who the other processes are"),
    ],
)
def test_processes_that_cannot_be_found(environment, arguments, sentence):
    result = subprocess.run(
        [sys.executable, "train.py", "--config=configs/digits.py", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_a_workdir_of_its_own_is_refused_at_the_start(tmp_path, environment, data_dir):
    """They would wait for each other in the first save."""
    last = [f"--workdir={tmp_path / 'other'}"]
    started = start(environment, tmp_path / "one", data_dir, processes=2, last=last)
    for said in finish(started, status=1):
        assert "is not the same folder in all processes (process 1 does not see" in said
    assert not list((tmp_path / "one").glob(".shared-*"))


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
NOISE = """
import asyncio, logging, multiprocessing, os, sys, threading, time, warnings
from cait_jax.errors import quiet_libraries
from cait_jax.processes import end_program

class Mistake(Exception):
    pass

class Finaliser:
    def __del__(self):
        raise RuntimeError("nobody catches this")

def chatter():
    while True:
        os.write(2, b"a library's own line\\n")
        time.sleep(0.001)

def child(queue):
    queue.put(1)
    time.sleep(0.5)
    os.write(2, b"a child's last words\\n")

def main():
    logging.getLogger("absl").error("Traceback", exc_info=ValueError("x"))
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    Finaliser()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    context.Process(target=child, args=(queue,)).start()
    queue.get()
    threading.Thread(target=chatter, daemon=True).start()
    threading.Thread(target=time.sleep, args=(1e6,)).start()  # which Python would wait for
    time.sleep(0.05)
    print("what was found")
    {ending}

if __name__ == "__main__":
    quiet_libraries()
    try:
        main()
    except BaseException as error:
        end_program("prog", error, (Mistake,))
"""


@pytest.mark.parametrize(
    ("ending", "status", "last"),
    [
        ('raise Mistake("give another")', 1, "prog: give another"),
        ('raise OSError(28, "No space left on device", "/x/y")', 1,
         "prog: /x/y: no space left on device; make room, or choose another place"),
        ('sys.exit("prog: as it is")', 1, "prog: as it is"),
    ],
)  # fmt: skip
def test_the_sentence_is_the_last_line(tmp_path, ending, status, last):
    program = tmp_path / "program.py"
    program.write_text(NOISE.replace("{ending}", ending).replace("\\\\n", "\\n"))
    result = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=ENVIRONMENT,
    )
    lines = result.stderr.splitlines()
    assert (result.returncode, lines[-1]) == (status, last)
    assert result.stdout == "what was found\n"
    assert set(lines[:-1]) == {"a library's own line"}


def test_a_defect_keeps_its_traceback(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from cait_jax.processes import end_program\n"
        "try:\n    [][1]\nexcept Exception as error:\n    end_program('prog', error, (KeyError,))\n"
    )
    result = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        1, "IndexError: list index out of range"
    )  # fmt: skip


def test_refusals_of_the_machine_are_sentences():
    refused = PermissionError(errno.EACCES, "Permission denied", "/runs")
    assert explain(refused) == (
        "/runs: permission denied; change its permissions, or choose another place"
    )
    absent = FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x")
    assert explain(absent) == (
        "/proc/x: no such file or directory; check the path, or choose another place"
    )
    exhausted = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.")
    assert "too little memory (RESOURCE_EXHAUSTED" in explain(exhausted)
    assert explain(exhausted).endswith(
        "lower batch_size, or lower image_size, or use a smaller model"
    )
    assert explain(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None
    assert explain(ValueError("a defect")) is None
