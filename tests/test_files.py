"""Files are replaced whole, JSON is strict, and a run's folder is one that checkpoints can be kept in."""

import errno
import json
import os

import pytest

from cait_jax import UserError
from cait_jax.files import atomic_replace, run_folder, run_folder_name, to_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with atomic_replace(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="no space"), atomic_replace(path) as temporary:
        temporary.write_text("new")
    with pytest.raises(KeyError), atomic_replace(path) as temporary:
        raise KeyError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_has_null_for_what_is_not_finite():
    text = to_json({"a": (float("nan"), 1), "b": {"c": float("-inf")}})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1], "b": {"c": None}}


@pytest.mark.parametrize("name", ["photos [1]-m", "a*b", "what?", r"b\s", os.fsdecode(b"caf\xe9")])
def test_a_folder_whose_checkpoints_orbax_would_not_find_again_is_refused(name, tmp_path):
    with pytest.raises(
        UserError, match=r"checkpoints cannot be kept in .*; give another --workdir"
    ):
        run_folder(tmp_path / name)
    renamed = run_folder_name(name)
    assert renamed != name
    assert run_folder(tmp_path / renamed) == tmp_path / renamed


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("file", "file is no directory"),
        ("file/run", "file is no directory"),
        ("dangling", "dangling is no directory"),
        ("/proc/run", "No such file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_folder_in_which_nothing_can_be_written_is_refused(name, cause, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=rf"{cause}.*; choose another directory"):
        run_folder(tmp_path / name)
    run_folder(tmp_path / "new" / "run")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["my run", "caf\u00e9", 'a"%20#', "-x"])
def test_other_names_of_folders_stay(name, tmp_path):
    assert run_folder_name(name) == name
    assert run_folder(tmp_path / name) == tmp_path / name
