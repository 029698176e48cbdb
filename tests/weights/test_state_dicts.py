"""State dicts come out of a file as they went in, or not at all and with a sentence."""

import argparse
import contextlib
import errno
import os
import pickle
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from trees import random_params

from cait_jax import create_model, export_timm, load_pretrained, save_pretrained
from cait_jax.checkpoint.store import Checkpoints
from cait_jax.errors import UserError
from cait_jax.weights.adapt import mean_params
from cait_jax.weights.state_dicts import (
    check_finite,
    read_weights,
    replace_files,
    write_safetensors,
)

# Made with torch.save: {"model": {"module.a.weight": ..., "module.b": bfloat16, ...}, "epoch": 3}.
FIRST_RELEASE = Path(__file__).parents[1] / "fixtures" / "first_release.pth"


def some_weights():
    values = np.random.default_rng(0).standard_normal((4, 6))
    return {
        "single": values.astype(np.float32),
        "half": values.astype(np.float16),
        "brain": values.astype(ml_dtypes.bfloat16),
        "double": values,
        "transposed": values.astype(np.float32).T,
        "count": np.int64(3).reshape(()),
    }


def test_safetensors_keep_dtypes_and_bits(tmp_path):
    weights = some_weights()
    write_safetensors(tmp_path / "new" / "w.safetensors", weights)
    found = read_weights(tmp_path / "new" / "w.safetensors")
    assert set(found) == set(weights)
    for name, array in weights.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    with safe_open(tmp_path / "new" / "w.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "model.", "backbone.", "net.", "student.", "ema.", "ema_model.",
        "module._orig_mod.", "_orig_mod.module.", "model.backbone._orig_mod.", "my_own_network.",
    ],
)  # fmt: skip
def test_a_prefix_before_every_name_is_dropped(tmp_path, prefix):
    one = np.ones(1)
    save_file(
        {f"{prefix}a": one, f"{prefix}b.c": one, "n_averaged": np.zeros((), np.int64)},
        tmp_path / "w.safetensors",
    )
    assert set(read_weights(tmp_path / "w.safetensors")) == {"a", "b.c"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_before_some_names_is_an_error_that_names_it(tmp_path, prefix):
    one = np.ones(1)
    save_file({f"{prefix}a": one, f"{prefix}b": one, "c": one}, tmp_path / "w.safetensors")
    first = prefix[: prefix.index(".") + 1]
    with pytest.raises(
        UserError,
        match=rf"w\.safetensors: 2 of 3 names begin with '{first}' .*, the others do not \(c\)",
    ):
        read_weights(tmp_path / "w.safetensors")


def test_a_part_of_a_network_keeps_its_names(tmp_path):
    save_file({"blocks.0.norm1.weight": np.ones(1)}, tmp_path / "w.safetensors")
    assert set(read_weights(tmp_path / "w.safetensors")) == {"blocks.0.norm1.weight"}


def test_of_weights_and_their_average_the_one_that_is_asked_for(tmp_path, caplog):
    names = {"online_model.a": np.zeros(1), "ema_model.module.a": np.ones(1), "step": np.ones(())}
    save_file(names, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors")["a"] == 0
    assert "also holds averaged weights (ema_model.): load it by ema=True" in caplog.text
    assert read_weights(tmp_path / "w.safetensors", ema=True)["a"] == 1
    names = {"state_dict.a": np.zeros(1), "state_dict_ema.a": np.ones(1)}
    save_file(names, tmp_path / "w.safetensors")
    assert [read_weights(tmp_path / "w.safetensors", ema=ema)["a"] for ema in (False, True)] == [
        0,
        1,
    ]
    save_file({"a": np.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"holds no average of its weights: leave out ema=True"):
        read_weights(tmp_path / "w.safetensors", ema=True)


def written(path: Path) -> bytes:
    save_file({"a": np.ones((50, 4), np.float32)}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-1], r"is truncated .*: download it again"),
        (lambda data: data[:40], r"is truncated .*: download it again"),
        (lambda data: b"<html>404</html>" * 9, r"no safetensors file .*: download it again"),
        (lambda data: b"", r"is empty: download it again"),
    ],
)
def test_a_broken_file_is_named_with_the_cause_and_the_fix(tmp_path, damage, sentence):
    path = tmp_path / "w.safetensors"
    path.write_bytes(damage(written(path)))
    with pytest.raises(UserError, match=f"w.safetensors.*{sentence}") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("absent.safetensors", "does not exist"),
        ("folder.pth", "Is a directory"),
        ("w.h5", r"give a file ending in \.safetensors, \.pth, \.pt, \.bin"),
    ],
)
def test_what_is_no_file_of_weights(tmp_path, name, sentence):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match=f"{name}.*{sentence}"):
        read_weights(tmp_path / name)


def test_a_file_without_arrays(tmp_path):
    save_file({}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds no arrays"):
        read_weights(tmp_path / "w.safetensors")


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, existing):
    folder = tmp_path / "model"
    if existing:
        write_safetensors(folder / "w.safetensors", {"old": np.ones(2)})
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"w\.safetensors could not be written .*No space left"):
        write_safetensors(folder / "w.safetensors", {"new": np.ones(2)})
    assert sorted(tmp_path.rglob("*")) == before
    assert not existing or set(read_weights(folder / "w.safetensors")) == {"old"}


def test_who_may_read_a_file_is_as_for_any_other(tmp_path):
    (tmp_path / "any").touch()
    write_safetensors(tmp_path / "w.safetensors", {"a": np.ones(2)})
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_files_that_go_together_appear_together(tmp_path):
    def fails(path):
        assert (path.parent / "a").read_text() == "first"
        raise OSError("the second file")

    with pytest.raises(UserError, match=r"a and b could not be written .*the second file"):
        replace_files(tmp_path, {"a": lambda path: path.write_text("first"), "b": fails})
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError, match="a bug"):
        replace_files(tmp_path / "new", {"a": lambda path: {}["a bug"]})
    assert not list(tmp_path.iterdir())


# PyTorch's files. It is not installed where the tests run: what is asked of it is held by a stand-in, and
# what it really gives by hand, in an environment with both.


def test_without_pytorch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'first_release\.pth .* pip install "cait-jax\[torch\]"'):
        read_weights(FIRST_RELEASE)


class Tensor:
    """As much of a tensor as reading needs; a view gives the same bits."""

    def __init__(self, array, dtype=None):
        self.array, self.dtype = array, dtype

    def detach(self):
        return self

    def contiguous(self):
        return Tensor(np.ascontiguousarray(self.array), self.dtype)

    def view(self, dtype):
        return Tensor(self.array.view(dtype), dtype)

    def numpy(self):
        return self.array


def stand_in(result):
    torch = types.ModuleType("torch")
    torch.Tensor, torch.bfloat16, torch.uint16 = Tensor, "bfloat16", np.uint16
    torch.calls = []

    def load(path, **options):
        torch.calls.append((Path(path), options))
        if isinstance(result, Exception):
            raise result
        return result

    torch.load = load
    torch.serialization = types.SimpleNamespace(safe_globals=allowing(torch))
    return torch


def allowing(torch):
    @contextlib.contextmanager
    def safe_globals(classes):
        torch.allowed = classes
        yield

    return safe_globals


BRAIN = np.array([1.5, -2.0], ml_dtypes.bfloat16)
STATE = {
    "a.weight": Tensor(np.arange(6.0, dtype=np.float32).reshape(2, 3).T),
    "b": Tensor(BRAIN, "bfloat16"),
}
OTHER = {name: Tensor(-1 * tensor.array, tensor.dtype) for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "epoch": 3},
        {"state_dict": STATE, "optimizer": {}},
        {"model": {f"module.{name}": tensor for name, tensor in STATE.items()}},
        {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}},
        {"model": {"depth": 3}, "model_state_dict": STATE, "args": argparse.Namespace(lr=1)},
        {"module": {"model": STATE}, "model_ema": OTHER},
        {"model_ema": STATE},
    ],
)
def test_state_dicts_of_pytorch(monkeypatch, content):
    torch = stand_in(content)
    monkeypatch.setitem(sys.modules, "torch", torch)
    weights = read_weights(FIRST_RELEASE)
    assert torch.calls == [(FIRST_RELEASE, {"map_location": "cpu", "weights_only": True})]
    np.testing.assert_array_equal(weights["a.weight"], [[0, 3], [1, 4], [2, 5]])
    assert weights["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weights["b"], BRAIN)
    assert len(weights) == 2


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
def test_a_checkpoint_of_timm_or_deit_has_both(monkeypatch, caplog, averaged):
    content = {"epoch": 3, "state_dict": STATE, averaged: OTHER, "optimizer": {"state": {}}}
    torch = stand_in(content | {"args": argparse.Namespace()})
    monkeypatch.setitem(sys.modules, "torch", torch)
    np.testing.assert_array_equal(read_weights(FIRST_RELEASE)["b"], BRAIN)
    assert f"also holds averaged weights ({averaged})" in caplog.text
    np.testing.assert_array_equal(read_weights(FIRST_RELEASE, ema=True)["b"], -1 * BRAIN)
    assert torch.allowed == [argparse.Namespace]


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (pickle.UnpicklingError("Unsupported global"), "more than tensors, .* could run code"),
        (RuntimeError("failed finding central directory. And more.\nAnd more."), "truncated or no"),
        (EOFError(), r"truncated .*\(EOFError\): download it again"),
        ([1], "holds a list, not named tensors"),
        ({"lots": STATE}, "holds 'lots', of type dict, where weights are expected"),
        ({"a": 3}, "holds 'a', of type int"),
    ],
)
def test_what_pytorch_cannot_read_or_should_not(monkeypatch, result, sentence):
    monkeypatch.setitem(sys.modules, "torch", stand_in(result))
    with pytest.raises(UserError, match=rf"first_release\.pth .*{sentence}") as caught:
        read_weights(FIRST_RELEASE)
    assert "\n" not in str(caught.value)


def test_what_is_no_pickle_is_not_given_to_pytorch(monkeypatch, tmp_path):
    torch = stand_in(STATE)
    monkeypatch.setitem(sys.modules, "torch", torch)
    (tmp_path / "w.bin").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"w\.bin is truncated or no file of PyTorch's"):
        read_weights(tmp_path / "w.bin")
    assert torch.calls == []


NAME = "cait_nano4_patch4_8"
SHAPE = {"depth": 1, "width": 16, "num_heads": 2, "num_classes": 3}


@pytest.fixture
def network():
    model = create_model(NAME, **SHAPE)
    return model, {"params": random_params(model)}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_the_weight_is_named_with_how_many(kind):
    weights = {"a": np.ones(3, kind), "count": np.ones(2, np.int64), "b": np.ones((2, 3), kind)}
    check_finite(weights)
    weights["b"][1, 0], weights["b"][0, 2] = np.nan, -np.inf
    with pytest.raises(UserError, match=r"^b has 2 of 6 numbers that are NaN or infinite:"):
        check_finite(weights)
    weights["a"][0] = np.inf
    with pytest.raises(UserError, match=r"^a has 1 of 3 .* infinite, and so have 1 more:"):
        check_finite(weights)


def test_a_dtype_that_would_overflow_is_refused():
    weights = {"a": np.array([1.0, 1e39])}
    with pytest.raises(UserError, match="a has 1 numbers that float32 cannot hold"):
        check_finite(weights, np.float32)
    check_finite(weights, np.float64)
    with pytest.raises(UserError, match="a has 1 numbers that bfloat16 cannot hold"):
        check_finite(weights, ml_dtypes.bfloat16)


def test_every_loader_refuses_them(network, tmp_path):
    model, variables = network
    save_pretrained(tmp_path / "saved", model, variables)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    weights["blocks.0.mlp.fc1.weight"][3, 5] = np.nan
    save_file(weights, tmp_path / "w.safetensors")
    sentence = r"blocks\.0\.mlp\.fc1\.weight has 1 of 1,024 numbers that are NaN"
    for source in (NAME, tmp_path / "saved"):
        with pytest.raises(UserError, match=rf"w\.safetensors: {sentence}"):
            load_pretrained(source, weights=tmp_path / "w.safetensors", **SHAPE)

    # A directory that another program made, its sum right.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cait_jax.weights.saved.check_finite", lambda weights: None)
        bad = jax.tree.map(jnp.asarray, variables)
        bad["params"]["head"]["bias"] = bad["params"]["head"]["bias"].at[1].set(jnp.inf)
        save_pretrained(tmp_path / "bad", model, bad)
    with pytest.raises(UserError, match=r"bad: head\.bias has 1 of 3 numbers"):
        load_pretrained(tmp_path / "bad")

    # A run whose parameters overflowed.
    config = {"image_size": 8, "model": {"name": NAME, "depth": 1, "width": 16, "num_heads": 2}}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        meta = {"config": config, "class_names": ["a", "b", "c"], "channels": 1}
        checkpoints.save(1, {"params": bad["params"]}, meta)
    with pytest.raises(UserError, match=r"head\.bias has 1 of 3 numbers"):
        load_pretrained(tmp_path / "run")


def test_no_writer_writes_them(network, tmp_path):
    model, variables = network
    huge = jax.tree.map(lambda leaf: np.full(leaf.shape, 3e38, leaf.dtype), variables)
    infinite = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), huge)
    for write in (save_pretrained, export_timm):
        with pytest.raises(UserError, match="numbers that are NaN or infinite, and so have"):
            write(tmp_path / "new", model, infinite)
    with pytest.raises(UserError, match="numbers that are NaN or infinite"):
        export_timm(tmp_path / "w.safetensors", model, infinite)
    assert not list(tmp_path.iterdir())
    # A mean is summed in float64, so it overflows only where its parts did.
    mean = mean_params([huge, huge])
    save_pretrained(tmp_path / "mean", model, mean)
