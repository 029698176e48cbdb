"""`cait plan`: a config's step on chips that are not there. The compiler of this CPU stands for TPU's."""

import importlib.metadata
import json
from dataclasses import replace

import jax
import pytest
from click.testing import CliRunner

from cait_jax import UserError
from cait_jax.cli import main
from cait_jax.cli.plan import read_config
from cait_jax.models.inspect import macs, parameter_count, residual_bytes
from cait_jax.models.zoo import create_model
from cait_jax.plan.plan import abstract_split, make_plan
from cait_jax.plan.roofline import parse_topology
from configs import cait_xxs24, digits


def small():
    config = digits.get_config()
    config.model.depth, config.model.width, config.model.num_heads = 2, 32, 4
    config.model.class_depth = 1
    config.model.attention = "xla"  # the compiler that stands for TPU's knows no other
    config.batch_size = 64
    config.augment.hflip, config.augment.pad_crop, config.augment.rotate = False, 0, 0.0
    return config


@pytest.fixture
def devices_of_this_cpu(monkeypatch):
    monkeypatch.setattr(
        "cait_jax.plan.plan.tpu_devices", lambda topology: jax.devices()[: topology.chips]
    )


@pytest.mark.slow
def test_a_step_is_compiled_counted_and_kept(devices_of_this_cpu, tmp_path):
    said = []
    topology = parse_topology("v5e:2x4")
    plan = make_plan(small(), topology, folder=tmp_path, say=said.append)
    assert said == ["compiling for v5e:2x4; this takes minutes"]
    assert plan.compiled
    assert plan.fits
    assert plan.by_chip == 8

    model = create_model(
        "cait_nano4_patch4_8", depth=2, class_depth=1, width=32, num_heads=4, num_classes=10, in_channels=1,
        patch_size=small().model.patch_size,
    )  # fmt: skip
    assert plan.useful == 3 * 2 * macs(model) * 8
    assert 0.9 < plan.operations / plan.useful < 1.0  # images have no gradient
    (exchanged,) = {each.kind for each in plan.exchanged}
    assert exchanged == "all-reduce"
    sent = sum(each.bytes * each.times for each in plan.exchanged)
    assert sent == pytest.approx(4 * parameter_count(model), rel=0.1)
    assert plan.memory > plan.state
    assert plan.traffic > plan.state
    assert plan.utilisation == pytest.approx(
        plan.useful / plan.roofline.seconds / topology.chip.operations
    )

    assert sum(plan.origins.values()) == plan.traffic
    assert any(origin.startswith("backward: blocks") for origin in plan.origins)

    again = make_plan(small(), topology, folder=tmp_path, say=said.append)
    assert again == plan
    assert len(said) == 1
    changed = small()
    changed.model.depth = 3
    make_plan(changed, topology, folder=tmp_path, say=said.append)
    assert len(said) == 2


@pytest.mark.slow
def test_under_fsdp_a_chip_holds_its_part(devices_of_this_cpu, tmp_path):
    whole = make_plan(small(), parse_topology("v5e:2x4"), folder=tmp_path)
    config = small()
    config.mesh.data, config.mesh.fsdp = 1, 8
    plan = make_plan(config, parse_topology("v5e:2x4"), folder=tmp_path)
    assert plan.state < whole.state / 4
    assert plan.operations == whole.operations
    assert "all-gather" in {each.kind for each in plan.exchanged}


@pytest.mark.slow
def test_the_largest_batch_was_seen_to_fit():
    topology = parse_topology("h100:4")
    room = 4.0 * make_plan(small(), topology, estimate=True).memory
    topology = replace(topology, chip=replace(topology.chip, memory=room))
    found = make_plan(small(), topology, largest=True, estimate=True).largest
    config = small()
    config.batch_size = found.batch * 4
    assert make_plan(config, topology, estimate=True).memory == found.memory
    assert 0.95 * room < found.memory <= room


@pytest.mark.slow
def test_a_teacher_costs_its_forward_pass():
    plain, taught = (cait_xxs24.get_config("distilled") for _ in range(2))
    plain.distill.kind = "none"
    topology = parse_topology("h100:64x8")
    without, with_teacher = (
        make_plan(config, topology, estimate=True) for config in (plain, taught)
    )
    forward = 2 * macs(create_model("regnety_160")) * 2  # two images on each of 512 GPUs
    assert with_teacher.operations - without.operations == pytest.approx(forward, rel=0.01)
    assert with_teacher.useful == without.useful


@pytest.mark.slow
def test_crops_cost_their_passes_and_the_teacher_its_own(devices_of_this_cpu, tmp_path):
    config = small()
    config.objective, config.optimizer.ema_decay = "dino", 0.0
    for key in ("zoom", "shear", "translate", "reprob", "mixup", "cutmix"):
        config.augment[key] = 0.0
    config.augment.rand_augment = ""
    config.dino.local_crops, config.dino.local_size = 3, 4
    config.dino.head_hidden, config.dino.bottleneck, config.dino.out_dim = 16, 8, 8
    plan = make_plan(config, parse_topology("v5e:2x4"), folder=tmp_path)
    sizes = {"depth": 2, "class_depth": 1, "width": 32, "num_heads": 4, "num_classes": 0}
    seen, local = (
        macs(
            create_model(
                "cait_nano4_patch4_8", image_size=side, patch_size=config.model.patch_size, **sizes
            )
        )
        for side in (8, 4)
    )
    assert plan.useful == 3 * 2 * (2 * seen + 3 * local) * 8
    taught = plan.useful + 2 * 2 * seen * 8
    assert plan.operations == pytest.approx(taught, rel=0.15)  # the head, and crops cut by products
    estimate = make_plan(config, parse_topology("h100:8"), estimate=True)
    assert estimate.useful == plan.useful
    assert estimate.memory > estimate.state


@pytest.mark.slow
def test_gpus_get_an_estimate_of_counted_work():
    config = cait_xxs24.get_config()
    config.model.remat = "none"
    config.batch_size = 64
    plan = make_plan(config, parse_topology("h100:8"), estimate=True)
    model = create_model("cait_xxs24", dtype="bfloat16", attention="xla")
    assert not plan.compiled
    kept = residual_bytes(model, 8) - 4 * 11_956_264
    assert plan.memory == pytest.approx(plan.state + 4 * 11_956_264 + kept, rel=0.05)

    config.mesh.data, config.mesh.fsdp = 1, 8
    divided = make_plan(config, parse_topology("h100:8"), estimate=True)
    assert divided.state == plan.state // 8
    assert {each.kind for each in divided.exchanged} == {"all-gather", "reduce-scatter"}
    config.model.remat = "block"
    assert make_plan(config, parse_topology("h100:8"), estimate=True).memory < divided.memory / 4


def masked():
    config = small()
    config.objective = "mae"
    config.mae.decoder_width, config.mae.decoder_depth, config.mae.decoder_heads = 16, 1, 2
    return config


def test_masked_patches_cost_what_is_computed_of_them():
    """Of 4 patches 1 or 3 are encoded, and all are decoded."""
    topology = parse_topology("h100:4")
    few, many = masked(), masked()
    many.mae.mask_ratio = 0.25
    plans = [make_plan(config, topology, estimate=True) for config in (few, many)]
    linear = (
        2 * 12 * 32**2 * 16
    )  # multiply-accumulates of two blocks on 16 images, but for attention
    assert plans[1].useful - plans[0].useful == pytest.approx(6 * 2 * linear, rel=0.1)
    assert all(0.7 < plan.operations / plan.useful <= 1.01 for plan in plans)
    assert plans[0].state == plans[1].state
    assert plans[0].memory < plans[1].memory
    many.model.remat = "block"
    assert make_plan(many, topology, estimate=True).memory < plans[1].memory


@pytest.mark.slow
def test_masked_autoencoding_is_compiled(devices_of_this_cpu, tmp_path):
    plan = make_plan(masked(), parse_topology("v5e:2x4"), folder=tmp_path)
    assert plan.compiled
    assert plan.fits
    assert 0.7 < plan.operations / plan.useful <= 1.01


def run(*arguments):
    return CliRunner().invoke(main, ["plan", *arguments])


def test_the_command_prints_facts_tables_and_json():
    alone = run(
        "--config=configs/digits.py", "--topology=h100:2", "--estimate", "--config.batch_size=32"
    )
    assert alone.exit_code == 0, alone.output
    assert "32, 16 a chip" in alone.output
    assert "(estimate)" in alone.output

    several = run(
        "--config=configs/digits.py",
        "--topology=h100:2",
        "--topology=a100:4",
        "--estimate",
        "--markdown",
    )
    assert several.exit_code == 0, several.output
    assert several.output.count("| digits") == 2

    as_json = run("--config=configs/digits.py", "--topology=h100:2", "--estimate", "--json")
    record = json.loads(as_json.output)[0]
    assert record["estimate"]
    assert record["batch_size"] == digits.get_config().batch_size
    assert record["memory_bytes"] > record["state_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=configs/digit.py", "--topology=h100:8"], "there is no config file configs/digit.py"),
        (["--config=configs/digits.py", "--topology=h1000:8"], "names no known chip"),
        (["--config=configs/digits.py", "--topology=h100:8", "--config.batchsize=8"], "batch_size"),
        (["--config=configs/digits.py", "--topology=h100:8", "--batch=8"], "unknown argument --batch=8"),
        (["--config=configs/digits.py", "--topology=h100:7"], "multiple of 7"),
        (["--config=configs/digits.py", "--topology=v5e:2x2"], 'pip install "cait-jax'),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(arguments, sentence, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("cait_jax.plan.compile.importlib.metadata.version", missing)
    result = run(*arguments)
    assert result.exit_code == 1
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_a_config_is_read_as_train_reads_it():
    config = read_config(
        "configs/cait_xs24.py", ["--config.mesh.fsdp=8", "--config.model.remat=block"]
    )
    assert (config.mesh.fsdp, config.model.remat) == (8, "block")
    assert config.model.name == "cait_xs24"


@pytest.mark.parametrize(
    ("name", "classes", "channels"),
    [("imagenet2012", 1000, 3), ("cifar10", 10, 3), ("mnist", 10, 1)],
)
def test_data_need_not_be_there(name, classes, channels, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    split = abstract_split(name, "train", image_size=(32, 32))
    assert (split.num_classes, split.channels) == (classes, channels)
    with pytest.raises(UserError, match="image 3 stands for one that is elsewhere"):
        split.records[3]
