"""What the processes of a sweep's runs share."""

import os

import pytest

from cait_jax.errors import UserError
from cait_jax.files import DirectoryLock
from cait_jax.train.sweep import runs


def test_runs_beside_each_other_share_cores_and_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert runs._share(0, 1) == {}
    assert [runs._share(place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "6", "4"]
    taken = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own: taken.append(own), raising=False)
    for place in range(3):
        monkeypatch.setenv("CAIT_SWEEP_PLACE", f"{place}/3")
        runs._take_cores()
    assert taken == [[0, 7], [2], [3]]


class Silent:
    def began(self, run): ...
    def progress(self, run, line): ...
    def finished(self, run, row): ...
    def failed(self, run, reason): ...


def test_a_second_sweep_in_the_directory_is_refused(tmp_path):
    with (
        DirectoryLock(tmp_path),
        pytest.raises(UserError, match=r"is in use by .* give another --out"),
    ):
        runs.run_sweep("configs/digits.py", lambda rows: None, tmp_path, events=Silent())
