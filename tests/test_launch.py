"""The scripts in launch/ and the commands of docs/pods.md say what the programs they call understand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow_unless

from cait_jax.train.config import flatten, get_config

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").iterdir())
PAGE = (ROOT / "docs" / "pods.md").read_text()
TEXTS = {"docs/pods.md": PAGE} | {
    f"launch/{name}": (ROOT / "launch" / name).read_text() for name in SCRIPTS
}
TRAIN_FLAGS = {"config", "workdir", "distributed", "coordinator", "processes", "process"}
# Of `sbatch --help`: those that a job of several nodes with GPUs may want.
SBATCH_OPTIONS = {
    "account", "constraint", "cpus-per-task", "exclusive", "gpus-per-node", "gres", "job-name", "mem", "nodes",
    "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time",
}  # fmt: skip
# Of `xpk workload create --help` in xpk 1.16.
XPK_OPTIONS = {
    "base-docker-image", "cluster", "command", "docker-image", "env", "max-restarts", "num-slices", "priority",
    "project", "script-dir", "storage", "termination-grace-period-seconds", "tpu-type", "workload", "zone",
}  # fmt: skip

# What stands in for the programs that the scripts call: each goes on to what it would have started.
PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$SAID"',
    "mpirun": """while [[ $1 != bash ]]; do shift; done
        OMPI_COMM_WORLD_SIZE=16 OMPI_COMM_WORLD_RANK=9 OMPI_COMM_WORLD_LOCAL_RANK=1 exec "$@" """,
    "xpk": """for option; do
        [[ $option != --* ]] || echo "$option" | head -n 1 >>"$SAID"
        [[ $option != --command=* ]] || bash -c "${option#--command=}"
        done""",
    "pip": "",
    "git": "",
    "sudo": 'exec "$@"',
    "systemd-run": 'while [[ $1 != */python ]]; do shift; done; exec "$@"',
    "gcloud": """[[ $3 != queued-resources ]] || echo "$STATE"
        echo "gcloud $*" | head -n 1 >>"$SAID"
        for option; do
            case $option in
                *systemd-run*) bash -c "${option#--command=}" ;;
                --command=*) bash -n -c "${option#--command=}" ;;
            esac
        done""",
    "python": 'printf "%s\\n" "$@" >"$ARGUMENTS"; echo "$JAX_LOCAL_DEVICE_IDS" >"$IDS"; exit "${STATUS:-0}"',
}
SETTINGS = {
    "WORKDIR": "/shared/runs/one",
    "DATA_DIR": "/shared/tfds",
    "HOSTS": "node1:8,node2:8",
    "PROJECT": "project",
    "CLUSTER": "cluster",
    "STORAGE": "storage",
    "SHARE": "10.0.0.2:/share",
    "MOUNT": "/shared",
    "SLURM_CPUS_PER_TASK": "12",
    "SLURM_JOB_ID": "7",
    "STATE": "ACTIVE",
}
# With a bracket, as a shell would expand, and a space, as it would split.
OWN = ["--config.data.train_split=train[:90%]", "--config.augment.rand_augment=a b"]


@pytest.fixture
def launch(tmp_path):
    """Runs a script in a copy of the repository, with `PROGRAMS` for all that it calls."""
    home, root, programs = tmp_path / "home", tmp_path / "root", tmp_path / "programs"
    shutil.copytree(ROOT / "launch", root / "launch")
    for folder in (programs, root / ".venv" / "bin", home / "venv" / "bin", home / "cait"):
        folder.mkdir(parents=True)
    for name, body in PROGRAMS.items():
        program = programs / name
        program.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        program.chmod(0o755)
    for folder in (root / ".venv" / "bin", home / "venv" / "bin"):
        shutil.copy(programs / "python", folder)
    files = {name: tmp_path / name for name in ("ARGUMENTS", "IDS", "SAID")}
    for file in files.values():
        file.touch()

    def run(name, *arguments, **settings):
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(home),
            "SLURM_SUBMIT_DIR": str(root),
            **{key: str(file) for key, file in files.items()},
            **SETTINGS,
            **settings,
        }
        result = subprocess.run(
            ["bash", f"launch/{name}", *arguments],
            cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return result, {key: file.read_text().splitlines() for key, file in files.items()}

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_bash_and_stops_at_the_first_failure(name):
    result = subprocess.run(
        ["bash", "-n", f"launch/{name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert TEXTS[f"launch/{name}"].startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in TEXTS[f"launch/{name}"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    result = subprocess.run(
        ["shellcheck", *SCRIPTS], cwd=ROOT / "launch", capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "slurm.sbatch", SCRIPTS))
def test_train_accepts_what_a_script_passes_on(name, launch):
    """The program itself reads it: flags, config and keys, with the caller's own at the end and unchanged."""
    result, written = launch(name, *OWN)
    assert result.returncode == 0, result.stderr
    script, *arguments = written["ARGUMENTS"]
    assert script == "train.py"
    assert set(OWN) < set(arguments)
    assert "--workdir=/shared/runs/one" in arguments
    assert "--config.data.data_dir=/shared/tfds" in arguments

    several = [flag for flag in arguments if re.match("--(distributed|coordinator|process)", flag)]
    assert several == {
        "gpus.sh": [],
        "open_mpi.sh": ["--coordinator=node1:8476", "--processes=16", "--process=9"],
    }.get(name, ["--distributed"])
    assert written["IDS"] == (["1"] if name == "open_mpi.sh" else [""])

    checked = subprocess.run(
        [sys.executable, "train.py", *arguments, "--only_check_args"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_must_be_said_is_asked_for(name, launch):
    needed = re.findall(r": \"\$\{(\w+):\?", TEXTS[f"launch/{name}"])
    assert needed
    result, written = launch(name, **dict.fromkeys(needed, ""))
    assert result.returncode
    assert needed[0] in result.stderr
    assert not written["ARGUMENTS"]


@pytest.mark.parametrize(("status", "requeued"), [(130, True), (1, False), (0, False)])
def test_a_slurm_job_that_was_told_to_stop_is_queued_again(status, requeued, launch):
    result, written = launch("slurm.sbatch", STATUS=str(status))
    assert result.returncode == status
    assert written["SAID"] == (["scontrol requeue 7"] if requeued else [])


def test_sbatch_knows_the_options():
    lines = re.findall(r"^#SBATCH (.*)$", TEXTS["launch/slurm.sbatch"], re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        option = re.fullmatch(r"--([\w-]+)(=\S+)?", line)
        assert option, line
        assert option[1] in SBATCH_OPTIONS, line
    # sbatch stops reading options at the first line that is neither a comment nor empty.
    assert TEXTS["launch/slurm.sbatch"].rfind("#SBATCH") < TEXTS["launch/slurm.sbatch"].find(
        "\nset "
    )


def test_xpk_knows_the_options(launch):
    result, written = launch("xpk.sh")
    assert result.returncode == 0, result.stderr
    options = {line.removeprefix("--").split("=")[0] for line in written["SAID"]}
    assert {"command", "cluster", "tpu-type"} < options <= XPK_OPTIONS


@pytest.mark.parametrize(
    ("state", "verbs"),
    [("ACTIVE", ["list"]), ("FAILED", ["delete", "list"]), ("", ["create", "list"])],
)
def test_a_slice_is_asked_for_once_and_again_after_a_failure(state, verbs, launch):
    """The state that is told never changes: the script says that a slice failed, and waits for one to come."""
    waiting = {"BASH_FUNC_sleep%%": "() { exit 3; }"}
    result, written = launch("tpu_vm.sh", STATE=state, **waiting)
    words = [line.split() for line in written["SAID"]]
    assert (
        sorted({verb for _, _, _, group, verb, *_ in words if group == "queued-resources"}) == verbs
    )
    assert result.returncode == {"ACTIVE": 0, "FAILED": 1, "": 3}[state]


def test_every_key_flag_and_file_that_is_named_exists():
    keys = flatten(get_config())
    parts = {key.rpartition(".")[0] for key in keys}
    for where, text in TEXTS.items():
        for key in re.findall(r"(?<![\w/.])(?:--)?config\.([a-z_]+(?:\.[a-z_]+)*)", text):
            assert key in keys or key in parts, (where, key)
        for path in re.findall(r"(?<![\w/])(?:configs|launch|tests|cait_jax)/[\w./]+\w", text):
            assert (ROOT / path).exists(), (where, path)
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target


def test_every_command_of_the_page_is_one():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 8
    trained = 0
    for block in blocks:
        checked = subprocess.run(
            ["bash", "-n"], input=block, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, ""), block
        for line in block.replace("\\\n", " ").splitlines():
            if "train.py" not in line or line.lstrip().startswith("#"):
                continue
            trained += 1
            flags = re.findall(r"\s--(\w+)", line.split("train.py", 1)[1].split("#")[0])
            assert set(flags) <= TRAIN_FLAGS, line
    assert trained >= 4
