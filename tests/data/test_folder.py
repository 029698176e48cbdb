import functools
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_files import encode, noise, write_cifar10

from cait_jax.data import eval_batches, load_split, train_batches
from cait_jax.data.decode import random_resized_crop
from cait_jax.data.folder import folder_splits, load_folder, path_fraction
from cait_jax.data.image_files import expand_images
from cait_jax.data.sources import split_names
from cait_jax.data.split import BrokenImage
from cait_jax.errors import UserError

PICTURE = encode(noise(0, 6, 8))


def fill(root, *names, data=PICTURE):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def message_of(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files_of(split):
    return [
        (record["file_name"], record["label"])
        for record in (split.records[index] for index in range(len(split)))
    ]


def test_sorted_class_folders_are_the_labels(tmp_path):
    fill(tmp_path, "dog/b.JPEG", "dog/a.png", "cat/deep/er/x.WebP", "cat/z.tif", "cat/notes.txt")
    (tmp_path / "dog/a.png").write_bytes(b"as it is")
    split = load_folder(tmp_path)
    assert split.class_names == ("cat", "dog")
    assert files_of(split) == [
        ("cat/deep/er/x.WebP", 0), ("cat/z.tif", 0), ("dog/a.png", 1), ("dog/b.JPEG", 1),
    ]  # fmt: skip
    assert split.records[2]["image"] == b"as it is"
    assert (split.channels, load_folder(tmp_path, channels=1).channels) == (3, 1)


def test_what_is_hidden_counts_for_nothing(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.thumbs/1.jpg", "a/__MACOSX/1.jpg")
    fill(tmp_path, ".git/1.jpg", "__MACOSX/a/1.jpg", "readme.png")
    split = load_folder(str(tmp_path), "all")
    assert split.class_names == ("a",)
    assert files_of(split) == [("a/1.jpg", 0)]


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", "1.jpg", "in/2.jpg")
    root = fill(tmp_path / "root", "b/3.jpg")
    (root / "a").symlink_to(elsewhere)
    (elsewhere / "in" / "back").symlink_to(elsewhere)
    assert files_of(load_folder(root)) == [("a/1.jpg", 0), ("a/in/2.jpg", 0), ("b/3.jpg", 1)]


def test_splits(tmp_path):
    fill(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/c/4.jpg", "meta/x.jpg")
    assert folder_splits(tmp_path) == split_names(str(tmp_path)) == ("train", "val")
    assert files_of(load_folder(tmp_path, "train")) == [
        ("a/1.jpg", 0), ("b/2.jpg", 1), ("c/3.jpg", 2),
    ]  # fmt: skip
    for name in ("val", "validation"):
        split = load_folder(tmp_path, name)
        assert files_of(split) == [("c/4.jpg", 2)]  # the label of training
        assert split.num_classes == 3
    assert "is divided into train, val; say which" in message_of(load_folder, tmp_path)
    message = message_of(load_folder, tmp_path, "test")
    assert "has no split 'test'; it is divided into train, val" in message

    fill(tmp_path, "val/d/5.jpg")
    message = message_of(load_folder, tmp_path, "val")
    assert "does not have: d; rename or remove them there" in message


def undivided(root, count):
    return fill(root, *(f"{number % 3}/{number}.jpg" for number in range(count)))


def names_of(root, split):
    return {name for name, _ in files_of(load_folder(root, split))}


def test_an_undivided_folder_is_divided_by_its_paths(tmp_path):
    root = undivided(tmp_path / "few", 300)
    train, val = names_of(root, "train"), names_of(root, "val")
    assert train | val == names_of(root, "all")
    assert not train & val
    assert 15 < len(val) < 45
    assert load_folder(root, "val").class_names == load_folder(root, "train").class_names
    assert names_of(root, "validation") == val

    more = undivided(tmp_path / "more" / "elsewhere", 600)
    assert names_of(more, "val") & names_of(root, "all") == val


def test_where_a_path_falls_is_pinned():
    """Data once held out must stay so in every version."""
    digest = hashlib.sha256(b"cat/1.jpg").digest()
    assert path_fraction("cat/1.jpg") == pytest.approx(int.from_bytes(digest[:8]) / 2**64)
    assert path_fraction("caf\u00e9/1.jpg") == path_fraction("cafe\u0301/1.jpg")
    assert 0 <= path_fraction("a/\udcff.jpg") < 1  # a name that is no UTF-8


@pytest.mark.parametrize("split", ["all", "train", "val"])
def test_percents_of_a_split_of_a_folder(tmp_path, split):
    root = undivided(tmp_path, 400)
    parts = [names_of(root, f"{split}[{part}]") for part in (":25%", "25%:60%", "60%:")]
    assert set.union(*parts) == names_of(root, split)
    assert sum(len(part) for part in parts) == len(names_of(root, split))
    assert {name[0] for name in parts[0]} == {"0", "1", "2"}  # not the first classes
    assert names_of(root, f"{split}[:100%]") == names_of(root, split)


def test_percents_of_a_divided_folder(tmp_path):
    fill(tmp_path, *(f"train/a/{number}.jpg" for number in range(50)), "val/a/1.jpg")
    first, second = names_of(tmp_path, "train[:50%]"), names_of(tmp_path, "train[50%:]")
    assert len(first | second) == len(first) + len(second) == 50
    assert 10 < len(first) < 40


def test_parts_of_a_folder_that_do_not_exist(tmp_path):
    fill(tmp_path, "a/1.jpg")
    split = "val" if path_fraction("a/1.jpg") >= 0.1 else "train"
    assert f"none of the 1 images of {tmp_path} falls in {split!r}" in message_of(
        load_folder, tmp_path, split
    )
    for part in ("train[:5]", "train+val", "train[", "train[:5%"):
        assert "in whole percents, such as 'train[:50%]'" in message_of(load_folder, tmp_path, part)
    for part in ("all[50%:50%]", "all[:0%]", "all[:101%]"):
        assert "holds nothing" in message_of(load_folder, tmp_path, part)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    fill(tmp_path, "bus/1.jpg", "train/2.jpg")
    assert folder_splits(tmp_path) == ("all",)
    assert load_folder(tmp_path).class_names == ("bus", "train")


def test_folders_that_cannot_be_a_split(tmp_path):
    fill(tmp_path, "photos/1.jpg", "full/a/1.jpg", "full/b/readme.txt", "flat/train/1.jpg", "file")
    (tmp_path / "empty").mkdir()

    def message(name, split=None):
        return message_of(load_folder, tmp_path / name, split)

    assert "there is no folder" in message("phots")
    assert "nearest: photos" in message("phots")
    assert f"its folder {tmp_path / 'no'} does not exist either" in message("no/such")
    assert "is a file; give a folder" in message("file")
    assert "holds no class folders; put the images of each class into" in message("empty")
    assert f"{tmp_path / 'photos'} holds no class folders" in message("photos")
    assert f"{tmp_path / 'flat' / 'train'} holds no class folders" in message("flat")
    assert "classes without an image" in message("full")
    assert ": b (1 .txt); fill or remove" in message("full")
    assert "is not divided into splits such as 'test'" in message("photos", "test")


def test_a_file_that_went_away_is_named(tmp_path):
    split = load_folder(fill(tmp_path, "a/1.jpg"))
    (tmp_path / "a/1.jpg").unlink()
    message = message_of(split.records.__getitem__, 0)
    assert f"{tmp_path / 'a/1.jpg'} cannot be read any more: No such file" in message


def test_in_training_another_stands_in_for_a_file_that_went_away(tmp_path, caplog):
    split = load(fill(tmp_path, "a/1.png", "b/2.png"))
    (tmp_path / "a/1.png").unlink()
    with train_batches(split, seed=0, batch_size=2, image_size=(6, 8)) as batches:
        assert next(batches)["label"].tolist() == [1, 1]
        assert batches.broken == 1
    assert f"{tmp_path / 'a/1.png'} cannot be read any more" in caplog.text


def test_records_are_pickled_for_workers(tmp_path):
    split = load_folder(fill(tmp_path, "a/1.jpg", "b/2.jpg"))
    again = pickle.loads(pickle.dumps(split))
    assert files_of(again) == files_of(split)
    assert again.records[1]["image"] == PICTURE


def load(name, split="all", **options):
    return load_split(str(name), split, image_size=(6, 8), **options)


def test_a_path_names_a_folder_wherever_a_data_set_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "pictures/a/1.jpg", "train/cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        tmp_path / "pictures",
        "pictures",
        "./pictures",
        "~/pictures",
        "../" + str(tmp_path.name) + "/pictures",
    ):
        assert files_of(load(name)) == [("a/1.jpg", 0)]
    assert files_of(load(".", "train")) == [("cat/1.jpg", 0)]
    for name in ("./picturse", "~/picturse", str(tmp_path / "picturse")):
        assert "nearest: pictures" in message_of(load, name)


def test_a_data_set_that_lies_here_is_no_folder_of_images(tmp_path, monkeypatch):
    write_cifar10(tmp_path, {"test": [(encode(noise(0, 32, 32)), 3)]})
    monkeypatch.chdir(tmp_path)
    split = load("cifar10", "test", data_dir=str(tmp_path))
    assert split.num_classes == 10
    assert split_names("cifar10", data_dir=str(tmp_path)) == ("test",)
    # Nor is anything else under the name of a data set, such as a run of it; a path says what is meant.
    fill(tmp_path, "elsewhere/cifar10/cat/1.jpg")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("cifar10", "test", data_dir=str(tmp_path)).num_classes == 10
    assert files_of(load("./cifar10")) == [("cat/1.jpg", 0)]


def test_batches_of_a_folder_stand_upright(tmp_path):
    seen = noise(1, 6, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    fill(tmp_path, "a/1.png", data=encode(np.ascontiguousarray(np.rot90(seen)), exif=exif))
    split = load(tmp_path)
    with eval_batches(split, batch_size=1, image_size=(6, 8)) as batches:
        np.testing.assert_array_equal(next(batches)["image"][0], seen)
    whole = functools.partial(random_resized_crop, scale=(1.0, 1.0), ratio=(8 / 6, 8 / 6))
    with train_batches(split, seed=0, batch_size=1, image_size=(6, 8), crop=whole) as batches:
        np.testing.assert_array_equal(next(batches)["image"][0], seen)


def test_a_broken_image_of_a_batch_is_named(tmp_path):
    fill(tmp_path, "a/1.png", data=PICTURE[:60])
    with (
        eval_batches(load(tmp_path), batch_size=1, image_size=(6, 8)) as batches,
        pytest.raises(BrokenImage, match=r"a/1\.png"),
    ):
        next(batches)


def test_images_are_found_by_file_folder_and_pattern(tmp_path, monkeypatch):
    fill(
        tmp_path,
        "b.jpg",
        "a.PNG",
        "in/c.jpg",
        "in/deep/d.webp",
        "in/.hid.jpg",
        "text.txt",
        "[1].jpg",
    )
    monkeypatch.chdir(tmp_path)

    def found(*arguments):
        return [str(path) for path in expand_images(arguments)]

    assert found("b.jpg", Path("text.txt")) == ["b.jpg", "text.txt"]
    assert found(".") == ["[1].jpg", "a.PNG", "b.jpg", "in/c.jpg", "in/deep/d.webp"]
    assert found("*.jpg") == ["[1].jpg", "b.jpg"]
    assert found("**/*.jpg", "in") == ["[1].jpg", "b.jpg", "in/c.jpg", "in/deep/d.webp"]
    assert found("[1].jpg") == ["[1].jpg"]
    assert found("i*", "*") == ["in/c.jpg", "in/deep/d.webp", "[1].jpg", "a.PNG", "b.jpg"]
    assert found("in/c.jpg", "./in/../in/c.jpg", str(tmp_path / "in/c.jpg"), "in") == [
        "in/c.jpg",
        "in/deep/d.webp",
    ]
    assert found() == []
    monkeypatch.setenv("HOME", str(tmp_path / "in"))
    assert found("~/*.jpg") == [str(tmp_path / "in/c.jpg")]


def test_arguments_that_name_no_image(tmp_path):
    fill(tmp_path, "cat.jpg", "texts/a.txt")
    assert "nearest: cat.jpg" in message_of(expand_images, [tmp_path / "cta.jpg"])
    assert "check what is in" in message_of(expand_images, [tmp_path / "zzzzzz"])
    assert "no image matches" in message_of(expand_images, [f"{tmp_path}/*.gif"])
    assert "no image matches" in message_of(expand_images, [f"{tmp_path}/texts/*"])
    assert "holds no image; images end in .jpg" in message_of(expand_images, [tmp_path / "texts"])


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, cait_jax.data.folder, cait_jax.data.preprocess, cait_jax.evaluation.labels; "
        "print({'PIL', 'grain', 'sklearn', 'tensorflow_datasets', 'tqdm'} & set(sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert shown.stdout == "set()\n"
