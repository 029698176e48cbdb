"""Every recipe loads, is in the table, asks for data and a model that exist, and its step can be traced."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from marks import slow_unless

from cait_jax import UserError, create_model
from cait_jax.cli.recipes import recipes
from cait_jax.data.in_memory import SyntheticJpegs
from cait_jax.data.sampler import copies_in_a_group
from cait_jax.data.split import Encoded
from cait_jax.models.variants import VARIANTS
from cait_jax.train.config import check_values, default_workdir, flatten, get_config, load_config
from cait_jax.train.objectives.distillation import make_teacher
from cait_jax.train.setup import build
from configs import deit, imagenet

CONFIGS = Path(__file__).parents[2] / "configs"


@functools.cache
def arguments(file):
    """What a config file takes after its colon, as it says itself."""
    try:
        load_config(f"{file}:?")
    except UserError as error:
        found = str(error)
        if "takes no argument: leave out" in found:
            return ("",)
        if "takes " not in found:
            return ("DIR",)  # a folder
        ways = re.findall(r"(?<= )(no argument|:[\w,]*\w)", found.rpartition(", ")[0])
        return tuple(way.removeprefix(":") if way[0] == ":" else "" for way in ways)
    raise AssertionError(file)


FILES = sorted(
    path
    for path in CONFIGS.glob("*.py")
    if re.search(r"^(def )?get_config\b", path.read_text(), re.MULTILINE)
)
ALL = [
    path.name + f":{argument}" * bool(argument) for path in FILES for argument in arguments(path)
]
RECIPES = [name for name in ALL if not name.startswith("folder.py")]  # data that are known


def load(name):
    return load_config(str(CONFIGS / name))


# Parameters of each recipe's model. At another resolution a model has as many more as positions times width; with
# another head, as many less or more as classes times one more than the width. DINO's has a projection head.
PARAMETERS = {
    "digits.py": 303_018,
    "cait_xxs24.py": 11_956_264,
    "cait_xxs36.py": 17_299_720,
    "cait_xs24.py": 26_560_648,
    "cait_xs36.py": 38_557_432,
    "cait_s24.py": 46_916_200,
    "cait_s36.py": 68_220_712,
    "cait_s48.py": 89_525_224,
    "cait_m24.py": 185_850_088,
    "cait_m36.py": 270_929_512,
    "cait_m48.py": 356_008_936,
    "cait_xxs24.py:384": 12_029_224,
    "cait_xxs36.py:384": 17_372_680,
    "cait_xs24.py:384": 26_670_088,
    "cait_xs36.py:384": 38_666_872,
    "cait_s24.py:384": 47_062_120,
    "cait_s36.py:384": 68_366_632,
    "cait_s48.py:384": 89_671_144,
    "cait_m24.py:384": 186_141_928,
    "cait_m36.py:384": 271_221_352,
    "cait_m48.py:448": 356_460_520,
    "cait_xxs24.py:distilled": 11_956_264,
    "cait_xxs36.py:distilled": 17_299_720,
    "cait_xs24.py:distilled": 26_560_648,
    "cait_s24.py:distilled": 46_916_200,
    "cait_s36.py:distilled": 68_220_712,
    "cait_m36.py:distilled": 270_929_512,
    "cait_m48.py:distilled": 356_008_936,
    "cait_xs36.py:distilled": 38_557_432,
    "cait_s48.py:distilled": 89_525_224,
    "cait_m24.py:distilled": 185_850_088,
    "deit.py:tiny": 5_717_416,
    "deit.py:small": 22_050_664,
    "deit.py:base": 86_567_656,
    "deit.py:base,384": 86_859_496,
    "deit.py:tiny,distilled": 5_910_800,
    "deit.py:small,distilled": 22_436_432,
    "deit.py:base,distilled": 87_338_192,
    "deit3.py:small": 22_059_496,
    "deit3.py:base": 86_585_320 - (14**2 - 12**2) * 768,
    "deit3.py:large": 304_374_760 - (14**2 - 12**2) * 1024,
    "deit3.py:base,224": 86_585_320,
    "deit3.py:large,224": 304_374_760,
    "deit3.py:small,384": 22_205_416,
    "deit3.py:base,384": 86_877_160,
    "deit3.py:large,384": 304_763_880,
    "transfer.py:cifar10": 46_916_200 - 990 * 385,
    "transfer.py:cifar100": 46_916_200 - 900 * 385,
    "transfer.py:flowers": 46_916_200 - 898 * 385,
    "transfer.py:cars": 46_916_200 - 804 * 385,
    "transfer.py:inaturalist": 46_916_200 + 7142 * 385,
    "cifar10.py": 11_601_610,
    "cifar10.py:finetune": 7_755_840 + 10 * 193,
    "cifar10.py:hour": 684_346,
    "cifar10.py:hour,patch8": 693_562,
    "cifar10.py:small": 684_346,
    "vit_cifar10.py": 4_771_082,
    "mae.py:cifar10": 7_160_448 + 1_826_736,  # encoder and decoder
    "mae.py:imagenet": 42_979_584 + 25_812_480,
    "mae.py:small": 459_024 + 126_288,
    "dino.py:cifar10": 7_755_840 + 5_378_304,
    "dino.py:imagenet": 46_531_200 + 22_286_592,
    "dino.py:small": 461_040 + 410_752,
}
# Distillation on one head adds nothing.
PARAMETERS |= {
    f"{name},distilled": count
    for name, count in PARAMETERS.items()
    if re.search(r"cait_.*:\d+$", name)
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
    """Stands for `teacher_from_config`: the teacher, of zeros that are made only while tracing."""
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
    monkeypatch.setattr(
        "cait_jax.train.objectives.distillation.teacher_from_config", abstract_teacher
    )


def operations(name):
    """What decides which operations a recipe's step has: all but sizes, and strengths that are not 0."""
    config = load(name)
    variant = VARIANTS[config.model.name]
    parts = (config.model, config.augment, config.loss, config.distill, config.optimizer)
    chosen = [
        bool(value) if isinstance(value, int | float) else value
        for part in parts
        for key, value in part.items()
        if key != "name" or part is not config.model
    ]
    return repr((config.objective, variant.family, variant.attributes.get("distilled"), chosen))


def test_every_recipe_is_counted():
    assert set(PARAMETERS) == set(RECIPES)


def test_the_table_of_recipes_is_that_of_the_files():
    table = {row.recipe: row for row in recipes()}
    assert sorted(table) == sorted(ALL)
    for name in RECIPES:
        data = load(name).data.name
        assert table[name].data == ("scikit-learn's digits" if data == "digits" else data)
        expected, source = table[name].top1, table[name].source
        assert (expected is None) == (source is None)
    assert sum(row.run_here is not None for row in table.values()) == 3


def test_the_configs_are_few():
    texts = [path.read_text() for path in CONFIGS.glob("*.py")]
    assert len(texts) <= 24
    assert sum(len(text.splitlines()) for text in texts) <= 500


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_keys(name):
    config = load(name)
    assert set(flatten(config)) == set(flatten(get_config()))
    assert config.is_locked
    check_values(config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_config_file_names_exists(path):
    text = path.read_text()
    known = flatten(get_config())
    assert set(re.findall(r"--config\.([\w.]+)=", text)) <= known.keys()
    for argument in arguments(path):
        assert all(part in text for part in argument.split(","))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_wrong_argument_is_told_the_right_ones(path, tmp_path):
    if path.stem == "folder":
        with pytest.raises(UserError, match="there is no folder"):
            load_config(f"{path}:{tmp_path / 'none'}")
        with pytest.raises(UserError, match=r"takes an argument: give --config=.*folder\.py:DIR"):
            load_config(str(path))
        return
    with pytest.raises(UserError, match=rf"{path.stem}\.py takes .*:wrong") as caught:
        load_config(f"{path}:wrong")
    message = str(caught.value)
    assert "\n" not in message
    for argument in arguments(path):
        assert (f":{argument}" if argument else "no argument") in message
    if "" not in arguments(path):
        with pytest.raises(UserError, match="and needs one of them"):
            load_config(str(path))
    else:
        assert load_config(f"{path}:") == load_config(str(path))


# The recipes of before, each in a file of its own.
TAUGHT = ("xxs24", "xxs36", "xs24", "s24", "s36", "m36", "m48")
OLD = [
    *(f"cait_{name}_384" for name in (*TAUGHT[:-1], "xs36", "s48", "m24")),
    *(f"cait_{name}_distilled" for name in TAUGHT),
    *(f"deit_{size}{variant}" for size in ("tiny", "small", "base") for variant in ("", "_distilled")),
    *(f"transfer_{data}" for data in ("cars", "cifar10", "cifar100", "flowers", "inaturalist")),
    "cait_m48_448", "deit_base_384", "cifar10_small",
]  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_an_old_path_is_told_the_new_one(name):
    with pytest.raises(UserError, match=r"there is no config file .* its recipe is ") as caught:
        load_config(str(CONFIGS / f"{name}.py"))
    now = str(caught.value).rpartition("--config=")[2]
    file, _, argument = Path(now).name.partition(":")
    stem = file.removesuffix(".py")
    assert "_".join([stem, *argument.split(",")]) == name
    load_config(now)


def test_what_never_was_a_config_is_not_called_old():
    for name in ("deit_large", "cait_xl_384", "cifar10_large", "transfer"):
        with pytest.raises(UserError) as caught:
            load_config(str(CONFIGS / "elsewhere" / f"{name}.py"))
        assert "any more" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in RECIPES if load(name).init.weights])
def test_fine_tuning_starts_from_the_default_workdir_of_its_recipe(name):
    before, start = start_of(name), load(name).init.weights
    assert before in RECIPES
    assert start == str(default_workdir(f"configs/{before}"))
    assert start != str(default_workdir(f"configs/{name}"))


def start_of(name):
    """The recipe that a fine-tuning at a higher resolution follows."""
    if name.startswith(("deit3.py:base", "deit3.py:large")):
        return name.removesuffix(",224").replace(",384", ",224")
    return re.sub(r"(:?)\b(384|448),?", r"\1", name).rstrip(",:")


@pytest.mark.parametrize("name", RECIPES)
def test_data_model_and_schedule_fit(name, without_data):
    config = load(name)
    trainer = build(config, devices=jax.devices()[:1])
    params = trainer.abstract_state.params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]

    optimizer = config.optimizer
    share = config.batch_size / (optimizer.reference_batch or config.batch_size)
    peak = optimizer.learning_rate * share
    assert optimizer.warmup_learning_rate < peak
    assert optimizer.final_learning_rate <= peak
    assert optimizer.warmup_epochs <= config.epochs / (4 if name.startswith("deit3.py") else 5)


# Of DeiT III the images of a process of the authors', where they are not 64.
DEIT3_ROWS = {"small": 256, "base": 256, "base,384": 32, "large,384": 16}


@pytest.mark.parametrize(
    ("argument", "numbers"),
    [
        # pixels, batch, epochs, rate, weight decay, drop path, smoothing, copies of an image
        ("small", (224, 2048, 800, 4e-3, 0.05, 0.05, 0.0, 3)),
        ("base", (192, 2048, 800, 3e-3, 0.05, 0.2, 0.0, 3)),
        ("large", (192, 2048, 800, 3e-3, 0.05, 0.45, 0.0, 3)),
        ("base,224", (224, 512, 20, 1e-5, 0.1, 0.2, 0.1, 1)),
        ("large,224", (224, 512, 20, 1e-5, 0.1, 0.45, 0.1, 1)),
        ("small,384", (384, 512, 20, 1e-5, 0.1, 0.0, 0.1, 1)),
        ("base,384", (384, 512, 20, 1e-5, 0.1, 0.15, 0.1, 1)),
        ("large,384", (384, 512, 20, 1e-5, 0.1, 0.4, 0.1, 1)),
    ],
)
def test_deit3_is_the_authors_commands(argument, numbers):
    config = load(f"deit3.py:{argument}")
    optimizer, augment = config.optimizer, config.augment
    assert numbers == (
        config.image_size, config.batch_size, config.epochs, optimizer.learning_rate,
        optimizer.weight_decay, config.model.drop_path_rate, config.loss.smoothing,
        config.data.aug_repeats,
    )  # fmt: skip
    trained = "," not in argument
    assert (optimizer.name, config.loss.name) == (
        ("lamb", "binary") if trained else ("adamw", "softmax")
    )
    assert (augment.three_augment, augment.color_jitter) == (
        (True, 0.3) if trained else (False, 0.0)
    )
    assert augment.rand_augment == ("" if trained else "rand-m9-mstd0.5-inc1")
    assert (augment.mixup, augment.cutmix, augment.reprob) == (0.8, 1.0, 0.0)
    assert (optimizer.reference_batch, optimizer.warmup_epochs, config.eval.crop_pct) == (0, 5, 1.0)


KINDS = {operations(name): name for name in RECIPES}.values()


@pytest.mark.parametrize("name", slow_unless(lambda name: name == next(iter(KINDS)), KINDS))
def test_each_kind_of_step_can_be_traced(name, without_data):
    config = load(name)
    trainer = build(config, devices=jax.devices()[:1])
    state = trainer.abstract_state
    shape = (config.batch_size, *trainer.model.image_size, trainer.model.in_channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    }
    after, metrics = jax.eval_shape(trainer.train_step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    of = {
        "supervised": {"accuracy"},
        "mae": {"masked_mse", "visible_mse"},
        "dino": {"teacher_entropy", "mean_entropy", "feature_std"},
    }[config.objective]
    assert set(metrics) == {"loss", *of, "learning_rate", "grad_norm", "finite"}


@pytest.mark.parametrize(
    "name",
    [name for name in RECIPES if re.search("384|448", name) and "deit3" not in name],
)
def test_a_higher_resolution_changes_nothing_of_the_recipe_it_follows(name):
    """But for the author's numbers for it: constant 5e-6, and of DeiT a weight decay of 1e-8."""
    before = start_of(name)
    first, then = (flatten(load(which)) for which in (before, name))
    changed = {key for key in first if first[key] != then[key]}
    own = {"image_size", "batch_size", "epochs", "init.weights"}
    rates = {"learning_rate", "reference_batch", "final_learning_rate"}
    more = {"cait_m48.py": {"model.drop_path_rate"}, "deit.py": {"optimizer.weight_decay"}}
    file = name.partition(":")[0]
    assert changed == own | {f"optimizer.{key}" for key in rates} | more.get(file, set())
    length = (512, 30, 1e-8) if file == "deit.py" else (256, 60, 0.05)
    assert (then["batch_size"], then["epochs"], then["optimizer.weight_decay"]) == length
    rate, final = then["optimizer.learning_rate"], then["optimizer.final_learning_rate"]
    assert (rate, final, then["optimizer.reference_batch"]) == (5e-6, 5e-6, 0)
    assert then["init.weights"] == str(default_workdir(before))
    assert then["image_size"] == int(re.search("384|448", name)[0])


def settings(name, *keys):
    flat = flatten(load(name))
    return [flat[key] for key in keys]


@pytest.mark.parametrize("name", RECIPES)
def test_the_rate_changes_once_an_epoch_where_the_authors_code_does(name):
    authors = name.startswith(("cait_", "deit.py", "deit3.py", "transfer.py"))
    assert settings(name, "optimizer.per_epoch") == [authors]


def test_a_run_of_the_recipe_peaks_in_its_seventh_epoch(without_data):
    trainer = build(load("cait_xs24.py"), devices=jax.devices()[:1])
    starts = [-(-epoch * 1_281_167 // 1024) for epoch in range(400)]
    rates = [trainer.optimizer.schedule(step) for step in starts[:9]]
    expected = [1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.99618e-4, 9.9945e-4]
    assert rates[:8] == pytest.approx(expected, rel=1e-5)
    assert trainer.optimizer.schedule(starts[6] - 1) == rates[5]
    # 400 epochs of which the last is at 1e-5 plus what the cosine has left two epochs before its end.
    assert trainer.optimizer.schedule(trainer.total_steps - 1) == pytest.approx(1.0061e-5, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("transfer.py")])
def test_sgd_has_nesterov_momentum(name):
    kind, nesterov, momentum = settings(
        name, "optimizer.name", "optimizer.nesterov", "optimizer.momentum"
    )
    assert (kind, nesterov) == (("adamw", False) if "inat" in name else ("sgd", True))
    assert momentum == 0.9


def test_vit_on_cifar10_is_its_sources():
    dropout = ("embedding_dropout", "attention_dropout", "dropout", "projection_dropout")
    assert settings("vit_cifar10.py", *(f"model.{key}" for key in dropout)) == [0.1, 0.1, 0.1, 0.0]
    rates = ("warmup_learning_rate", "learning_rate", "final_learning_rate")
    found = settings("vit_cifar10.py", "augment.rotate", *(f"optimizer.{key}" for key in rates))
    assert found == [36.0, 0.0, 1e-3, 1e-8]


def test_distillation_on_one_head_is_called_an_assumption():
    taught = [name for name in RECIPES if name.endswith("distilled")]
    assert len(taught) == 2 * 10 + 3
    for name in taught:
        assert settings(name, "distill.kind") == ["hard"]
        assert name.startswith("cait_") != load(name).model.name.endswith("_distilled")
    _, assumed = (
        (Path(__file__).parents[2] / "docs" / "recipe.md").read_text().split("\n## Assumed\n")
    )
    assert "**Hard distillation of CaiT on its one head**" in assumed
    assert "docs/recipe.md" in imagenet.__doc__
    assert "assume" not in deit.__doc__


def test_data_sets_are_those_of_tfds(tmp_path):
    import tensorflow_datasets as tfds

    for name in DATA.keys() - {"digits"}:
        features = tfds.builder(name, data_dir=tmp_path).info.features
        assert features["label"].num_classes == DATA[name][0]
        assert features["image"].shape[-1] == DATA[name][1]


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_mixes_copies_of_an_image_by_one_draw(name):
    config = load(name)
    augment = config.augment
    if augment.mixup or augment.cutmix:
        assert not copies_in_a_group(config.batch_size, augment.mix_rows, config.data.aug_repeats)
    if config.data.name == "imagenet2012" and config.objective == "supervised":
        assert augment.mix_rows == DEIT3_ROWS.get(name.removeprefix("deit3.py:"), 64)
