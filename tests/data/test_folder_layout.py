"""Which folders are splits and which are classes; what cannot be told is refused."""

import os

import pytest
from test_folder import files_of, fill, message_of

from cait_jax.data.folder import class_name, folder_splits, load_folder, purpose_of, read_layout
from cait_jax.train.finetune import look_through

CLASSES = ("cat", "dog")


def divided(root, *splits):
    for split in splits:
        for number, name in enumerate(CLASSES):
            fill(root, *(f"{split}/{name}/{i}.jpg" for i in range(2 + number)))
    return root


@pytest.mark.parametrize(
    ("purpose", "names"),
    [
        ("train", ["train", "Train", "TRAINING", "training_set", "trainset", "train data", "Train-Images"]),
        ("val", ["val", "valid", "Validation", "VAL", "eval", "dev", "validation_set", "dev set", "valset"]),
        ("test", ["test", "Testing", "TEST", "test_set", "test-data"]),
        (None, ["cat", "trainer", "trains", "tests", "seg_train", "data", "images", "", "train test", "2"]),
    ],
)  # fmt: skip
def test_words_for_a_split(purpose, names):
    assert {name: purpose_of(name) for name in names} == dict.fromkeys(names, purpose)


@pytest.mark.parametrize(
    ("splits", "measured"),
    [
        (("train", "valid", "test"), "valid"),
        (("Train", "Test"), "Test"),
        (("Training", "Testing"), "Testing"),
        (("TRAINING", "VALIDATION", "TEST"), "VALIDATION"),
        (("training_set", "test_set"), "test_set"),
        (("train", "dev"), "dev"),
    ],
)
def test_splits_are_known_by_their_words(tmp_path, splits, measured):
    """`test` is never learnt from, nor measured on while there is a split for validation."""
    root = divided(tmp_path, *splits)
    assert folder_splits(root) == splits
    found = look_through(root)
    assert (found.train_split, found.eval_split) == (splits[0], measured)
    assert (found.class_names, found.images, found.eval_images) == (CLASSES, 5, 5)
    assert files_of(load_folder(root, "train")) == files_of(load_folder(root, splits[0]))
    for other in ("Train", "training"):
        assert load_folder(root, other).records.root == root / splits[0]


def test_a_split_in_a_folder_of_its_own_name(tmp_path):
    root = divided(tmp_path, "training_set/training_set", "test_set/test_set")
    assert look_through(root).class_names == CLASSES
    assert load_folder(root, "test").records.root == root / "test_set" / "test_set"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["train/cat/1.jpg", "Train/cat/1.jpg"], "has Train and train, which both mean train: merge"),
        (["train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], "has val and valid, which both mean val"),
        (["train/cat/1.jpg", "cat/1.jpg", "dog/1.jpg"], r"splits \(train\) and classes \(cat\) side by side"),
        (["train/a/1.jpg", "val/1.jpg"], "has train with folders of classes, and val with images but no"),
        (["train/1.jpg", "test/1.jpg", "bus/1.jpg"], "has test and train, which hold images but no folders"),
        (["train/1.jpg", "test/1.jpg"], "holds no class folders"),
        (["set/train/a/1.jpg", "set/val/a/1.jpg"], "its folder set is divided into train and val: give .*set$"),
        (["x/set/train/a/1.jpg"], "its folder x/set is divided into train: give .*x/set$"),
        (["a/train/1.jpg", "a/test/1.jpg", "b/train/1.jpg"], "a holds test and train: splits go above classes"),
        (["seg_train/a/1.jpg", "seg_test/a/1.jpg"], "has seg_test and seg_train, which look like splits"),
        (["images/1/2.jpg", "labels/1.txt"], "holds images and labels, which are no classes"),
        (["images/cat/1.jpg"], "holds images, which are no classes.* give .*images if it has them"),
        (["train/images/1.jpg", "train/labels/1.txt"], "holds images and labels, which are no classes"),
        (["Pets/cat/1.jpg", "Pets/dog/1.jpg"], "holds one folder alone, Pets, and that cat, dog: give"),
    ],
)  # fmt: skip
def test_what_is_half_understood_is_refused(tmp_path, files, sentence):
    import re

    root = fill(tmp_path, *files)
    split = "train" if any(f.startswith("train/") for f in files) else "all"
    message = message_of(load_folder, root, split)
    assert re.search(sentence, message), message


@pytest.mark.parametrize(
    ("splits", "beside", "sentence"),
    [
        (("train",), "Validierung", "nothing to measure on; beside it are Validierung, of which"),
        (
            ("test",),
            "Trainingsdaten",
            "has test but no train to learn from; beside it are Training",
        ),
    ],
)
def test_what_may_be_a_split_is_named_where_one_is_missing(tmp_path, splits, beside, sentence):
    root = divided(tmp_path, *splits)
    fill(root, f"{beside}/cat/1.jpg")
    assert sentence in message_of(look_through, root)


def test_what_lies_beside_splits_is_said(tmp_path):
    root = divided(tmp_path, "train", "val", "images to predict")
    (root / "empty").mkdir()
    layout = read_layout(root)
    assert (layout.names, layout.beside) == (("train", "val"), ("images to predict",))
    said = load_folder(root, "val").left_out
    assert said == f"left out of {root / 'val'}: 5 files (5 images in images to predict/)"


def test_a_class_may_be_called_train_or_have_such_a_folder(tmp_path):
    fill(tmp_path, "vehicles/train/1.jpg", "vehicles/bus/2.jpg", "animals/3.jpg")
    assert load_folder(tmp_path).class_names == ("animals", "vehicles")
    fill(tmp_path, "test tube/4.jpg", "train station/5.jpg")
    assert load_folder(tmp_path).num_classes == 4


def test_images_without_labels_to_test_on_are_no_split(tmp_path):
    root = divided(tmp_path, "train", "val")
    fill(root, "test/1.jpg")
    assert look_through(root).eval_split == "val"
    assert "has no split 'test'" in message_of(load_folder, root, "test")


SYSTEM = (
    "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".ipynb_checkpoints",
    "__MACOSX", ".thumbnails", ".Trash-1000", ".AppleDouble", "__pycache__", "LOST.DIR",
)  # fmt: skip


def test_folders_and_files_of_systems_are_neither_classes_nor_left_out(tmp_path):
    root = divided(tmp_path, "train", "val")
    for name in SYSTEM:
        fill(root, f"{name}/1.jpg", f"train/{name}/1.jpg", f"train/cat/{name}/cat@SYNO.jpg")
    fill(
        root,
        *(f"train/cat/{n}" for n in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.jpg", "0.jpg~")),
    )
    (root / "train" / "MISC").mkdir()  # of a camera's card
    assert folder_splits(root) == ("train", "val")
    training = load_folder(root, "train")
    assert (training.class_names, len(training)) == (CLASSES, 5)
    assert training.left_out is None
    fill(root, "train/MISC/1.jpg")
    assert load_folder(root, "train").class_names == ("MISC", *CLASSES)


def test_names_of_classes_are_composed_and_printable_as_utf_8(tmp_path):
    assert class_name("cafe\u0301") == "caf\u00e9"
    assert class_name(os.fsdecode(b"d\xf6g")) == r"d\xf6g"
    fill(
        tmp_path,
        "train/caf\u00e9/1.jpg",
        "train/dog/2.jpg",
        "val/cafe\u0301/3.jpg",
        "val/dog/4.jpg",
    )
    for split, folder in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        found = load_folder(tmp_path, split)
        assert found.class_names == ("caf\u00e9", "dog")
        assert files_of(found)[0][0].startswith(f"{folder}/")
        assert found.records[0]["label"] == 0


def test_folders_of_one_name_in_two_forms_are_one_class(tmp_path):
    fill(tmp_path, "caf\u00e9/1.jpg", "cafe\u0301/2.jpg", "cake/3.jpg", "Cake/4.jpg")
    found = load_folder(tmp_path)
    assert found.class_names == ("Cake", "caf\u00e9", "cake")  # case tells classes apart
    assert sorted(label for _, label in files_of(found)) == [0, 1, 1, 2]


def test_a_class_may_be_empty_only_where_another_split_names_it(tmp_path):
    root = divided(tmp_path, "train", "val")
    for path in (root / "val" / "cat").iterdir():
        path.unlink()
    found = load_folder(root, "val")
    assert (found.class_names, {label for _, label in files_of(found)}) == (CLASSES, {1})
    fill(root, "val/cat/1.heic", "val/cat/2.HEIC", "val/cat/notes")
    message = message_of(load_folder, root, "val")
    assert "cat (2 .heic" in message
    assert "1 without a suffix)" in message
    (root / "train" / "fox").mkdir()
    assert ": fox; fill or remove" in message_of(load_folder, root, "train")


def test_a_folder_is_found_in_either_form(tmp_path):
    fill(tmp_path, "cafe\u0301/cat/1.jpg", "cafe\u0301/dog/1.jpg")
    assert load_folder(tmp_path / "caf\u00e9").class_names == CLASSES
