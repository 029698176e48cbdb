"""ONNX files in onnxruntime, against JAX. `CAIT_JAX2ONNX` names the environment of `cait export --to onnx`."""

import json
import os
import sys
from pathlib import Path

import pytest
from export_networks import NETWORKS, network

from cait_jax import UserError, create_model
from cait_jax.export import environment, onnx
from cait_jax.export.onnx import check_onnx, export_onnx, fits_one_file

DIRECTORY = os.environ.get("CAIT_JAX2ONNX")
CONVERTS = [
    pytest.mark.slow,
    pytest.mark.skipif(DIRECTORY is None, reason="CAIT_JAX2ONNX names no environment of jax2onnx"),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=CONVERTS) for name in NETWORKS])
def test_a_file_gives_what_its_network_gives(name, tmp_path):
    model, variables, preprocessing = network(name)
    attention = name in ("cait", "distilled", "late")
    report = export_onnx(
        tmp_path, model, variables, environment=DIRECTORY, preprocessing=preprocessing,
        attention=attention, uint8=name in ("cait", "grey"), int8=name == "cait",
    )  # fmt: skip
    assert report.files[0].difference <= 1e-5
    assert report.files[0].bytes == (tmp_path / "model.onnx").stat().st_size
    described = json.loads((tmp_path / "export.json").read_text())
    assert described["opset"] == 18
    assert described["outputs"][1:] == ["attention"] * attention
    if name == "cait":
        assert 1e-5 < report.files[1].difference < 0.3
        assert described["files"] == ["model.onnx", "model_int8.onnx"]


@pytest.mark.slow
@CONVERTS[1]
def test_weights_that_one_file_cannot_hold_are_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "MOST_BYTES", 1000)
    model, variables, preprocessing = network("cait")
    report = export_onnx(
        tmp_path / "out", model, variables, environment=DIRECTORY, preprocessing=preprocessing, int8=True
    )  # fmt: skip
    names = ["model.onnx", "model.onnx.data", "model_int8.onnx", "model_int8.onnx.data"]
    assert json.loads((tmp_path / "out" / "export.json").read_text())["files"] == names
    sizes = [(tmp_path / "out" / name).stat().st_size for name in names]
    assert [file.bytes for file in report.files] == [sum(sizes[:2]), sum(sizes[2:])]
    assert sizes[1] > 2 * sizes[3] > 0
    assert report.files[0].difference <= 1e-5


def test_what_one_file_holds():
    assert fits_one_file(create_model("cait_m48"))
    assert not fits_one_file(create_model("vit_giant_patch14_dinov2.lvd142m"))


def test_what_onnx_cannot_hold_is_refused():
    with pytest.raises(UserError, match="bfloat16"):
        check_onnx(create_model("cait_xxs24", dtype="bfloat16"))


def test_an_environment_is_asked_for(tmp_path):
    model, variables, _ = network("cait")
    with pytest.raises(UserError, match=r"give environment=DIR, and install=True"):
        export_onnx(tmp_path, model, variables, environment=None)
    with pytest.raises(UserError, match="add install=True to make it"):
        export_onnx(tmp_path, model, variables, environment=tmp_path / "none")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file").touch()
    with pytest.raises(UserError, match="neither empty nor a Python environment"):
        environment.environment_python(tmp_path / "some", install=True)


def test_an_environment_without_jax2onnx_is_named(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(UserError, match="cannot be used"):
        environment.environment_python(tmp_path, install=False)


def test_an_environment_with_another_jax_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho 0.9.0 0.12.1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    with pytest.raises(UserError, match=r"has JAX and Flax 0\.9\.0 0\.12\.1, and here they are"):
        environment.environment_python(tmp_path, install=False)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho first >&2\necho 'ValueError: no plugin for erf' >&2\nexit 1\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(onnx, "environment_python", lambda directory, install: Path(python))
    model, variables, _ = network("cait")
    with pytest.raises(UserError, match="no plugin for erf"):
        export_onnx(tmp_path / "out", model, variables, environment=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_file_that_differs_is_not_put_in_place(tmp_path, monkeypatch):
    """A stand-in for the environment gives zeros."""
    model, variables, _ = network("cait")
    fake = "import sys, pathlib, numpy as np\nwork = pathlib.Path(sys.argv[-1])\n"
    fake += "images = np.load(work / 'probes.npz')['images']\n(work / 'model.onnx').touch()\n"
    fake += "found = {'model.onnx/one/0': np.zeros((1, 5)), 'model.onnx/all/0': np.zeros((len(images), 5))}\n"
    fake += "np.savez(work / 'found.npz', **found, **{'model.onnx/seconds': 1.0})\n"
    (tmp_path / "fake.py").write_text(fake)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/fake.py "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(onnx, "environment_python", lambda *_, **__: tmp_path / "python")
    with pytest.raises(UserError, match="in onnxruntime the exported network differs"):
        export_onnx(tmp_path / "out", model, variables, environment=tmp_path)
    assert not (tmp_path / "out").exists()
