"""The same batch on more and more chips."""

import dataclasses

import pytest
from click.testing import CliRunner

from cait_jax import UserError
from cait_jax.cli import main
from cait_jax.plan.hlo import Collective
from cait_jax.plan.plan import Plan
from cait_jax.plan.roofline import parse_topology
from cait_jax.plan.scaling import strong_scaling


def plan(topology, *, batch=256):
    """A step of 1 TB of operations an image, and of 2 GB that a chip moves beside 0.5 GB an image."""
    topology = parse_topology(topology)
    images = batch / topology.chips
    return Plan(
        topology=topology,
        batch_size=batch,
        compiled=True,
        state=0,
        memory=0,
        fits=True,
        operations=images * 1e12,
        useful=images * 1e12,
        traffic=round(2e9 + images * 5e8),
        exchanged=(Collective("all-reduce", (), 10**8, 1, topology.chips),),
    )


def test_steps_are_those_of_the_plans_and_then_on_their_line():
    plans = [plan("v5e:8x8"), plan("v5e:4x4"), plan("v5e:4x8")]
    scaled = strong_scaling(plans)
    assert [each.chips for each in scaled] == [16, 32, 64, 128, 256]
    assert [each.planned for each in scaled] == [True, True, True, False, False]
    assert [each.bounds for each in scaled[:3]] == [plans[i].roofline for i in (1, 2, 0)]
    last = scaled[-1].bounds
    assert last.compute == pytest.approx(1e12 / 197e12)
    assert last.memory == pytest.approx(2.5e9 / 819e9)
    assert last.exchange == pytest.approx(2 * 1e8 * 255 / 256 / 200e9 + 16e-6)
    assert scaled[-1].images_per_second == pytest.approx(256 / last.seconds)
    assert scaled[-1].hours(256 * 3600) == pytest.approx(last.seconds)


def test_without_two_plans_of_one_kind_nothing_is_added():
    assert len(strong_scaling([plan("v5e:4x4")])) == 1
    assert len(strong_scaling([plan("v5e:4x4"), plan("v6e:4x8")])) == 2
    assert len(strong_scaling([plan("v5e:4x4"), plan("v5e:2x8")])) == 2


def test_a_step_that_does_not_fit_is_named():
    large = dataclasses.replace(plan("v5e:2x4"), fits=False)
    with pytest.raises(UserError, match="does not fit v5e:2x4: leave it out"):
        strong_scaling([large, plan("v5e:4x8")])


def test_the_command_prints_a_run_for_each_recipe():
    printed = CliRunner().invoke(
        main,
        ["plan", "--config=configs/digits.py", "--topology=h100:2", "--topology=h100:4", "--estimate",
         "--config.batch_size=16", "--config.epochs=10", "--examples=1600", "--strong-scaling", "--markdown"],
    )  # fmt: skip
    assert printed.exit_code == 0, printed.output
    assert "16 images a step, 1,000 steps" in printed.output
    rows = [line.split("|")[1].strip() for line in printed.output.splitlines() if line[:1] == "|"]
    assert rows[2:] == ["2", "4", "8 (line)", "16 (line)"]
