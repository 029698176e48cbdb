"""What `cait evaluate` and `cait features` make of a run on the digits that learnt without labels."""

import functools
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cait_jax import UserError
from cait_jax.cli.evaluate import command as evaluate_command
from cait_jax.cli.features import command as features_command


def check_feature_commands(run, workdir, tmp_path):
    """k-NN accuracy is the run's own, the probe learns, a head is missed, and features have width 16."""
    invoke = functools.partial(CliRunner().invoke, catch_exceptions=False)
    of_digits = ["--data", "digits", "--model", str(workdir)]
    result = invoke(evaluate_command, [*of_digits, "--knn", "--probe", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["knn"] == pytest.approx(run.metrics["eval/knn_accuracy"], abs=2 / 360)
    assert found["probe"] > 0.3
    with pytest.raises(UserError, match="has no head, so it knows no classes"):
        invoke(evaluate_command, of_digits)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "one.png")
    output = tmp_path / "f.npz"
    arguments = [str(tmp_path / "one.png"), "--model", str(workdir), "-o", str(output)]
    assert invoke(features_command, arguments).exit_code == 0
    assert np.load(output)["features"].shape == (1, 16)
