"""What is an image by its name, and what is said of the rest. What arguments name: `test_folder.py`."""

import errno
import os

import pytest
from test_folder import fill, message_of

from cait_jax.data.folder import load_folder
from cait_jax.data.image_files import expand_images, find_images, left_out_in_words


def test_what_is_left_out_is_counted_by_suffix(tmp_path):
    fill(
        tmp_path,
        "a/1.jfif",
        "a/2.JPG",
        "a/x.HEIC",
        "a/y.heic",
        "a/deep/z.avif2",
        "b/3.png",
        "b/README",
    )
    fill(tmp_path, "b/Thumbs.db", "b/.hidden.heic", "b/4.png.part.tmp")
    found = load_folder(tmp_path)
    assert len(found) == 3
    assert found.records.left_out == {".heic": 2, ".avif2": 1, "": 1}
    said = found.left_out
    assert said.startswith(f"left out of {tmp_path}: 4 files (2 .heic")
    assert said.endswith("1 without a suffix, 1 .avif2)")
    assert 'read after pip install "cait-jax[heif]"' in said
    assert left_out_in_words({}, "x") is None


def test_what_arguments_leave_out_is_counted_once(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/2.heic", "a/3.heic", "text.txt")
    found = find_images([tmp_path / "a", f"{tmp_path}/**/*", tmp_path / "text.txt"])
    assert [path.name for path in found.paths] == ["1.jpg", "text.txt"]
    assert found.left_out == {".heic": 2}  # a file that is named is tried
    assert "holds no image; " in (said := message_of(find_images, [fill(tmp_path / "b", "1.heic")]))
    assert "1 file (1 .heic" in said


def test_arguments_are_found_in_either_form(tmp_path):
    fill(tmp_path, "cafe\u0301/u\u0308.jpg")
    for argument in ("caf\u00e9/\u00fc.jpg", "caf\u00e9", "c*\u00e9/*.jpg"):
        assert [p.name for p in expand_images([tmp_path / argument])] == ["u\u0308.jpg"]


@pytest.mark.parametrize(
    "name", ["a\x1b[31m.jpg", "a\nb.jpg", os.fsdecode(b"caf\xe9.jpg"), "\u202egpj.exe"]
)
def test_names_in_sentences_are_escaped(tmp_path, name):
    fill(tmp_path, f"{name}.xyz/1.xyz", "k.jpg")
    said = message_of(expand_images, [tmp_path / f"{name}.xyz"])
    assert "\x1b" not in said
    said.encode()
    assert "\u202e" not in said


def test_images_outside_the_class_folders_are_said(tmp_path):
    fill(tmp_path, "a/1.jpg", "b/2.jpg", "loose.jpg", "other.PNG", "labels.csv")
    found = load_folder(tmp_path)
    assert (len(found), found.records.left_out) == (2, {"./": 2})
    assert found.left_out == f"left out of {tmp_path}: 2 files (2 images outside the class folders)"


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.jpg", "a/deep/2.jpg", "b/3.jpg")
    scandir = os.scandir

    def refusing(path="."):
        if os.fspath(path) == str(tmp_path / "a/deep"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for read in (load_folder, lambda folder: find_images([folder])):
        with pytest.raises(PermissionError, match="a/deep"):
            read(tmp_path)


def test_a_class_that_is_a_link_to_nowhere_is_refused(tmp_path):
    fill(tmp_path, "d/a/1.jpg", "d/b/2.jpg", "away/3.jpg")
    (tmp_path / "d/c").symlink_to(tmp_path / "away")
    (tmp_path / "d/readme.txt").symlink_to(tmp_path / "nowhere")
    assert load_folder(tmp_path / "d").class_names == ("a", "b", "c")
    (tmp_path / "away").rename(tmp_path / "gone")
    assert message_of(load_folder, tmp_path / "d") == (
        f"{tmp_path / 'd/c'} is a link to {tmp_path / 'away'}, which does not exist: mend the link or remove it"
    )


def test_an_image_without_permission_is_told_so(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.jpg", "b/2.jpg")
    found = load_folder(tmp_path)

    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    assert message_of(found.records.__getitem__, 0) == (
        f"image {tmp_path / 'a/1.jpg'} cannot be read: Permission denied; make it readable or leave it out"
    )
