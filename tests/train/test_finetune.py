"""Settings chosen by the size of a folder: they fit it, and a model in a directory stays what it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trees import random_params

from cait_jax import UserError, create_model, save_pretrained
from cait_jax.train.config import check_values, load_config
from cait_jax.train.finetune import Photographs, folder_config, look_through
from cait_jax.train.setup import build
from configs import digits

ROOT = Path(__file__).parents[2]


def fill(root, **counts):
    """Files in `root/CLASS/`, for each class as many as said; classes may have slashes as `__`."""
    for name, count in counts.items():
        folder = root / name.replace("__", "/")
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.jpg").write_bytes(b"never opened")
    return root


def photographs(images, classes=10):
    names = tuple(f"class {i:04}" for i in range(classes))
    return Photographs(Path("/photographs"), "val", images, max(1, images // 10), names)


def test_more_images_let_more_learn_with_stronger_augmentation():
    few = folder_config(photographs(999), "cait_xxs24_224")
    assert (few.init.fit_head, few.optimizer.train, few.epochs) == (True, "4", 15)
    assert (few.optimizer.learning_rate, few.optimizer.final_learning_rate) == (1e-4, 1e-6)
    assert (few.optimizer.warmup_epochs, few.optimizer.reference_batch) == (1.5, 0)
    assert not few.model.stacked  # else the backward pass would go through frozen blocks
    assert (few.optimizer.weight_decay, few.batch_size) == (0.01, 32)
    assert (few.augment.rand_augment, few.augment.reprob, few.augment.mixup) == ("", 0, 0)

    middle = folder_config(photographs(1_000), "cait_xxs24_224")
    assert not middle.init.fit_head
    assert (middle.optimizer.train, middle.optimizer.layer_decay) == ("all", 0.75)
    assert middle.augment.rand_augment
    assert middle.augment.mixup == middle.augment.cutmix == 0

    many = folder_config(photographs(20_001), "cait_xxs24_224")
    assert (many.optimizer.train, many.optimizer.layer_decay) == ("all", 1)
    assert many.augment.mixup > 0
    assert few.batch_size < middle.batch_size < many.batch_size

    # 2,000 images are few for 500 classes.
    assert folder_config(photographs(2_000, 500), "cait_xxs24_224").init.fit_head


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("what", [None, "all", "head", "two-phase", "lora"])
def test_every_size_fits_devices_and_images_and_is_long_enough(devices, what):
    for images in (8, 9, 31, 47, 100, 700, 1_500, 50_000):
        held = photographs(images, 2)
        config = folder_config(held, "cait_xxs24_224", what=what, devices=devices)
        check_values(config)
        assert config.is_locked
        assert config.batch_size % devices == 0
        assert 0 < config.batch_size <= images
        assert config.eval.batch_size <= held.eval_images
        assert config.epochs * images / config.batch_size >= 100
        assert config.data.aug_repeats == 1
        assert config.optimizer.ema_decay == 0


def test_what_is_asked_for_comes_before_the_table():
    config = folder_config(
        photographs(500), "vit_base_patch16_224", what="two-phase", epochs=4.0, batch_size=10,
        image_size=240, seed=3,
    )  # fmt: skip
    assert (config.init.fit_head, config.epochs) == (True, 4)
    assert (config.batch_size, config.image_size, config.seed) == (10, 240, 3)
    # How these weights see images: not as CaiT's.
    assert tuple(config.data.mean) == tuple(config.data.std) == (0.5, 0.5, 0.5)
    assert config.eval.crop_pct == 0.9
    assert (config.init.pretrained, config.init.weights, config.init.reset_head) == (
        True,
        None,
        True,
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "regnety_160"}, "choose a transformer"),
        ({"model": "cait_xs24"}, "the same architecture was as cait_xs24_384"),
        ({"model": "cait_xxs24_24"}, "nearest: cait_xxs24_224"),
        ({"model": "runs/none"}, "runs/none does not exist"),
        ({"what": "heads"}, "nearest: head"),
        ({"batch_size": 501}, "at most the images, such as batch_size=500"),
        ({"batch_size": 30, "devices": 4}, "such as batch_size=28"),
        ({"devices": 501}, "fewer than the 501 devices"),
    ],
)
def test_what_cannot_be_is_a_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        folder_config(photographs(500), **{"model": "cait_xxs24_224"} | options)
    assert "\n" not in str(caught.value)


SETTINGS = {"image_size": [8, 8], "crop_pct": 0.5, "mean": [0.4], "std": [0.3], "channels": 3}


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("cait_nano4_patch4_8", {"depth": 2, "class_token": 1, "residual": "rezero"}),
        (
            "vit_6x256",
            {"depth": 1, "patch_size": 4, "distilled": True, "mlp_ratio": 2.0, "width": 16},
        ),
    ],
)
def test_a_saved_model_of_any_attributes_starts_as_it_is(name, attributes, tmp_path):
    model = create_model(name, image_size=8, in_channels=3, num_classes=5, **attributes)
    save_pretrained(
        tmp_path / "saved", model, {"params": random_params(model)}, preprocessing=SETTINGS
    )
    folder = fill(tmp_path / "photos", train__a=20, train__b=20, val__a=2, val__b=2)
    config = folder_config(folder, str(tmp_path / "saved"), what="all", devices=8)
    assert (config.image_size, config.eval.crop_pct, config.data.mean) == (8, 0.5, (0.4,))
    trainer = build(config)
    assert trainer.model == model.clone(num_classes=2)
    assert trainer.init_state().params["head"]["bias"].shape == (2,)


def test_a_model_without_colour_is_refused(tmp_path):
    model = create_model("cait_nano4_patch4_8", depth=1, num_classes=5)
    settings = SETTINGS | {"channels": 1}
    save_pretrained(tmp_path, model, {"params": random_params(model)}, preprocessing=settings)
    with pytest.raises(UserError, match="without colour, and folders are read in colour"):
        folder_config(photographs(500), str(tmp_path))


def test_a_folder_is_divided_as_it_says_or_by_itself(tmp_path):
    whole = look_through(fill(tmp_path / "whole", cat=40, dog=40))
    assert whole.images + whole.eval_images == 80
    assert 0 < whole.eval_images < 20
    assert (whole.eval_split, whole.class_names) == ("val", ("cat", "dog"))
    parts = fill(tmp_path / "parts", train__a=2, train__b=1, test__a=1, validation__b=4)
    assert look_through(parts) == Photographs(parts, "validation", 3, 4, ("a", "b"))


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"cat": 30}, "one class, cat"),
        ({"train__a": 2, "train__b": 2}, "nothing to measure on: add a folder val"),
        ({"val__a": 2, "val__b": 2}, "has val but no train to learn from"),
        ({"train__a": 2, "train__b": 2, "val__c": 1}, "does not have: c"),
        ({"a": 2, "b": 2}, "divide the folder into folders train and val"),
    ],
)
def test_a_folder_that_does_not_do_is_a_sentence(counts, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        look_through(fill(tmp_path / "photos", **counts))
    assert "\n" not in str(caught.value)


def test_a_class_that_would_only_be_measured_is_refused(tmp_path):
    counts = {"many": 60} | {f"single {i}": 1 for i in range(40)}  # a tenth of these is kept
    with pytest.raises(UserError, match="so they cannot be learnt: single"):
        look_through(fill(tmp_path / "photos", **counts))


def test_splits_of_other_classes_are_refused(tmp_path):
    """Without `train` each split's own folders are its classes."""
    photos = fill(tmp_path / "photos", val__a=20, val__b=20, val__c=20, test__b=2, test__c=2)
    config = digits.get_config()
    config.data.name, config.data.train_split, config.data.eval_split = str(photos), "val", "test"
    with pytest.raises(UserError, match=r"'val' and 'test' of .* have other classes"):
        build(config)


def test_the_config_file_takes_a_folder(tmp_path):
    from configs import folder

    photos = fill(tmp_path / "photos", train__a=20, train__b=20, val__a=2, val__b=2)
    config = folder.get_config(str(photos))
    assert config == folder_config(photos, "cait_xxs24_224")
    file = f"{ROOT / 'configs' / 'folder.py'}:{photos}"
    assert load_config(file, {"seed": "1"}).seed == 1
    with pytest.raises(UserError, match="nearest: batch_size"):
        load_config(file, {"batchsize": "1"})
    (tmp_path / "photos" / "val" / "c").mkdir()
    with pytest.raises(UserError, match=r"has classes that .* does not have: c"):
        load_config(file)
    with pytest.raises(UserError, match=r"digits\.py takes no argument: leave out ':x'"):
        load_config(f"{ROOT / 'configs' / 'digits.py'}:x")
    with pytest.raises(UserError, match=r"nearest: .*folder\.py"):
        load_config(f"{ROOT / 'configs' / 'folders.py'}:{photos}")


def test_train_py_names_a_missing_folder_in_one_sentence(tmp_path):
    result = subprocess.run(
        [sys.executable, "train.py", f"--config=configs/folder.py:{tmp_path / 'photo'}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [result.stderr.strip()]
    assert f"there is no folder {tmp_path / 'photo'}" in result.stderr
