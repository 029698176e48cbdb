"""Every recipe loads, says how it is run, asks for data and a model that exist, and its step can be traced."""

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cait_jax import create_model
from cait_jax.data.order import copies_in_a_group
from cait_jax.data.sources import Encoded
from cait_jax.data.synthetic import SyntheticJpegs
from cait_jax.models.zoo import VARIANTS
from cait_jax.train import defaults
from cait_jax.train.config import flatten
from cait_jax.train.distill import make_teacher
from cait_jax.train.setup import abstract_state, set_up

CONFIGS = Path(__file__).parents[2] / "configs"


def named(head):
    """Names of the files in which `head` stands; the others hold what recipes share."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if head in path.read_text())


ALL = named("\ndef get_config(")
RECIPES = named("\ndef get_config() ")  # whose data and model do not hang on an argument


def module(name):
    return importlib.import_module(f"configs.{name}")


# Parameters of each recipe's model. At another resolution a model has as many more as positions times width; with
# another head, as many less or more as classes times one more than the width.
PARAMETERS = {
    "digits": 303_018,
    "cait_xxs24": 11_956_264,
    "cait_xxs36": 17_299_720,
    "cait_xs24": 26_560_648,
    "cait_xs36": 38_557_432,
    "cait_s24": 46_916_200,
    "cait_s36": 68_220_712,
    "cait_s48": 89_525_224,
    "cait_m24": 185_850_088,
    "cait_m36": 270_929_512,
    "cait_m48": 356_008_936,
    "cait_xxs24_384": 12_029_224,
    "cait_xxs36_384": 17_372_680,
    "cait_xs24_384": 26_670_088,
    "cait_xs36_384": 38_666_872,
    "cait_s24_384": 47_062_120,
    "cait_s36_384": 68_366_632,
    "cait_s48_384": 89_671_144,
    "cait_m24_384": 186_141_928,
    "cait_m36_384": 271_221_352,
    "cait_m48_448": 356_460_520,
    "cait_xxs24_distilled": 11_956_264,
    "cait_xxs36_distilled": 17_299_720,
    "cait_xs24_distilled": 26_560_648,
    "cait_s24_distilled": 46_916_200,
    "cait_s36_distilled": 68_220_712,
    "cait_m36_distilled": 270_929_512,
    "cait_m48_distilled": 356_008_936,
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "deit_base_384": 86_859_496,
    "deit_tiny_distilled": 5_910_800,
    "deit_small_distilled": 22_436_432,
    "deit_base_distilled": 87_338_192,
    "transfer_cifar10": 46_916_200 - 990 * 385,
    "transfer_cifar100": 46_916_200 - 900 * 385,
    "transfer_flowers": 46_916_200 - 898 * 385,
    "transfer_cars": 46_916_200 - 804 * 385,
    "transfer_inaturalist": 46_916_200 + 7142 * 385,
    "cifar10": 11_601_610,
    "cifar10_small": 684_346,
    "vit_cifar10": 4_771_082,
}

# Of each data set: classes, channels and the splits that have labels, in examples.
DATA = {
    "digits": (10, 1, {"train": 1437, "test": 360}),
    "imagenet2012": (1000, 3, {"train": 1_281_167, "validation": 50_000}),
    "cifar10": (10, 3, {"train": 50_000, "test": 10_000}),
    "cifar100": (100, 3, {"train": 50_000, "test": 10_000}),
    "oxford_flowers102": (102, 3, {"train": 1020, "validation": 1020, "test": 6149}),
    "cars196": (196, 3, {"train": 8144, "test": 8041}),
    "i_naturalist2018": (8142, 3, {"train": 437_513, "validation": 24_426}),
}


def split_of(name, split, *, image_size, data_dir):
    """Stands for `load_split`: as many examples, classes and channels, and nothing that could be read."""
    del image_size, data_dir
    classes, channels, sizes = DATA[name]
    count = sum(sizes[part] for part in split.split("+"))
    return Encoded(SyntheticJpegs(count), tuple(map(str, range(classes))), channels)


def abstract_teacher(config, model):
    """Stands for `given_teacher`: the teacher, of zeros that are made only while tracing."""
    if config.distill.kind == "none":
        return None
    network = create_model(config.distill.teacher)
    image = jnp.zeros((1, *network.image_size, network.in_channels))
    variables = jax.eval_shape(network.init, jax.random.key(0), image)

    def logits(images):
        return make_teacher(
            network,
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables),
            mean=config.data.mean,
            std=config.data.std,
            student_mean=config.data.mean,
            student_std=config.data.std,
            num_classes=model.num_classes,
        )(images)

    return jax.tree_util.Partial(logits)


@pytest.fixture
def without_data(monkeypatch):
    monkeypatch.setattr("cait_jax.train.setup.load_split", split_of)
    monkeypatch.setattr("cait_jax.train.setup.given_teacher", abstract_teacher)


def operations(name):
    """What decides which operations a recipe's step has: all but sizes, and strengths that are not 0."""
    config = module(name).get_config()
    variant = VARIANTS[config.model.name]
    parts = (config.model, config.augment, config.loss, config.distill, config.optimizer)
    chosen = [
        bool(value) if isinstance(value, int | float) else value
        for part in parts
        for key, value in part.items()
        if key != "name" or part is not config.model
    ]
    return repr((variant.network, variant.attributes.get("distilled"), chosen))


def test_every_recipe_is_counted():
    assert set(PARAMETERS) == set(RECIPES)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_has_the_keys_and_names_its_command(name):
    config = module(name).get_config()
    assert set(flatten(config)) == set(flatten(defaults.get_config()))
    assert config.is_locked

    text = module(name).__doc__
    assert f"\nCommand: python train.py --config=configs/{name}.py" in text
    assert "\nHardware and time: " in text
    for key in re.findall(r"--config\.([\w.]+)=", text):
        assert key in flatten(config)
    for other in re.findall(r"configs/(\w+)\.py", text):
        assert other in ALL


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_to_expect_of_it(name):
    text = module(name).__doc__
    assert re.search(r"^(Expected|Result|Aim)\b", text, re.MULTILINE)
    needs_data = module(name).get_config().data.name != "digits"
    assert ("--config.data.data_dir=DIR" in text) == needs_data


@pytest.mark.parametrize("name", RECIPES)
def test_data_model_and_schedule_fit(name, without_data):
    config = module(name).get_config()
    setup = set_up(config, devices=jax.devices()[:1])
    params = abstract_state(setup).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]

    optimizer = config.optimizer
    share = config.batch_size / (optimizer.reference_batch or config.batch_size)
    peak = optimizer.learning_rate * share
    assert optimizer.warmup_learning_rate < peak
    assert optimizer.final_learning_rate <= peak
    assert optimizer.warmup_epochs < config.epochs / 5


@pytest.mark.parametrize("name", {operations(name): name for name in RECIPES}.values())
def test_each_kind_of_step_can_be_traced(name, without_data):
    config = module(name).get_config()
    setup = set_up(config, devices=jax.devices()[:1])
    state = abstract_state(setup)
    shape = (config.batch_size, *setup.image_size, setup.model.in_channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    }
    after, metrics = jax.eval_shape(setup.train_step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(metrics) == {"loss", "accuracy", "learning_rate", "grad_norm"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name[-4:] in ("_384", "_448")])
def test_a_higher_resolution_changes_nothing_of_the_recipe_it_follows(name):
    """But for the author's numbers for it: constant 5e-6, and of DeiT a weight decay of 1e-8."""
    before = name.rpartition("_")[0]
    first, then = (flatten(module(which).get_config()) for which in (before, name))
    changed = {key for key in first if first[key] != then[key]}
    own = {"image_size", "batch_size", "epochs", "init.weights"}
    rates = {"learning_rate", "reference_batch", "final_learning_rate"}
    more = {"cait_m48_448": {"model.drop_path_rate"}, "deit_base_384": {"optimizer.weight_decay"}}
    assert changed == own | {f"optimizer.{key}" for key in rates} | more.get(name, set())
    length = (512, 30, 1e-8) if name == "deit_base_384" else (256, 60, 0.05)
    assert (then["batch_size"], then["epochs"], then["optimizer.weight_decay"]) == length
    rate, final = then["optimizer.learning_rate"], then["optimizer.final_learning_rate"]
    assert (rate, final, then["optimizer.reference_batch"]) == (5e-6, 5e-6, 0)
    assert then["init.weights"] == f"runs/{before}"
    assert then["image_size"] == int(name[-3:])


def settings(name, *keys):
    flat = flatten(module(name).get_config())
    return [flat[key] for key in keys]


@pytest.mark.parametrize("name", RECIPES)
def test_the_rate_changes_once_an_epoch_where_the_authors_code_does(name):
    authors = name.startswith(("cait_", "deit_", "transfer_"))
    assert settings(name, "optimizer.per_epoch") == [authors]


def test_a_run_of_the_recipe_peaks_in_its_seventh_epoch(without_data):
    setup = set_up(module("cait_xs24").get_config(), devices=jax.devices()[:1])
    starts = [-(-epoch * 1_281_167 // 1024) for epoch in range(400)]
    rates = [setup.schedule(step) for step in starts[:9]]
    expected = [1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.99618e-4, 9.9945e-4]
    assert rates[:8] == pytest.approx(expected, rel=1e-5)
    assert setup.schedule(starts[6] - 1) == rates[5]
    # 400 epochs of which the last is at 1e-5 plus what the cosine has left two epochs before its end.
    assert setup.schedule(setup.total_steps - 1) == pytest.approx(1.0061e-5, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("transfer_")])
def test_sgd_has_nesterov_momentum(name):
    kind, nesterov, momentum = settings(
        name, "optimizer.name", "optimizer.nesterov", "optimizer.momentum"
    )
    assert (kind, nesterov) == (("adamw", False) if "inat" in name else ("sgd", True))
    assert momentum == 0.9


def test_vit_on_cifar10_is_its_sources():
    dropout = ("embedding_dropout", "attention_dropout", "dropout", "projection_dropout")
    assert settings("vit_cifar10", *(f"model.{key}" for key in dropout)) == [0.1, 0.1, 0.1, 0.0]
    rates = ("warmup_learning_rate", "learning_rate", "final_learning_rate")
    found = settings("vit_cifar10", "augment.rotate", *(f"optimizer.{key}" for key in rates))
    assert found == [36.0, 0.0, 1e-3, 1e-8]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_distilled")])
def test_distillation_on_one_head_is_called_an_assumption(name):
    one_head = name.startswith("cait_")
    assert ("is an assumption" in module(name).__doc__) == one_head


def test_data_sets_are_those_of_tfds(tmp_path):
    import tensorflow_datasets as tfds

    for name in DATA.keys() - {"digits"}:
        features = tfds.builder(name, data_dir=tmp_path).info.features
        assert features["label"].num_classes == DATA[name][0]
        assert features["image"].shape[-1] == DATA[name][1]


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_mixes_copies_of_an_image_by_one_draw(name):
    config = module(name).get_config()
    augment = config.augment
    if augment.mixup or augment.cutmix:
        assert not copies_in_a_group(config.batch_size, augment.mix_rows, config.data.aug_repeats)
    if config.data.name == "imagenet2012":
        assert augment.mix_rows == 64
