"""Who may import whom (the contracts in pyproject.toml), and what an import costs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_layers_hold():
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_import_loads_neither_orbax_nor_grain_nor_tfds():
    code = (
        "import sys, cait_jax; print([m for m in ('orbax', 'grain', 'tensorflow_datasets', 'optax', "
        "'tensorflow', 'sklearn', 'PIL', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_the_project_runs_without_tensorflow():
    """No module of ours asks for it, and training's imports do not bring it in."""
    code = "import sys, cait_jax.train, cait_jax.data.sources; print('tensorflow' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "False"


def test_training_with_labels_loads_nothing_of_other_objectives():
    code = (
        "import sys\n"
        "from cait_jax.train.setup import build\n"
        "from configs import digits\n"
        "build(digits.get_config()).init_state()\n"
        "here = 'cait_jax.train.objectives'\n"
        "print(sorted(m for m in sys.modules if m.startswith(here)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = ["cait_jax.train.objectives", "cait_jax.train.objectives.supervised"]
    assert result.stdout.strip() == repr(loaded)


def test_what_a_network_does_not_use_is_not_imported():
    """Of a CaiT trained on a CPU with small images: neither RegNet nor kernels, nor Pallas."""
    code = (
        "import sys, jax, jax.numpy as jnp, cait_jax, cait_jax.train.loop\n"
        "model = cait_jax.create_model('cait_nano4_patch4_8', depth=1)\n"
        "x = jnp.zeros((1, 8, 8, 1))\n"
        "jax.make_jaxpr(model.apply)(jax.eval_shape(model.init, jax.random.key(0), x), x)\n"
        "unused = ('cait_jax.kernels.tpu', 'cait_jax.kernels.gpu', 'cait_jax.models.regnet', "
        "'jax.experimental.pallas')\n"
        "print([m for m in sys.modules if m.startswith(unused)])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
