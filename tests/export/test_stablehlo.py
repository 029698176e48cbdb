"""StableHLO folders, loaded again, against the networks that they were made of."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from export_networks import NETWORKS, images, network
from flax.traverse_util import flatten_dict
from jax import export as jax_export
from marks import slow, slow_unless
from safetensors.numpy import load_file

from cait_jax import UserError, forward_intermediates
from cait_jax.explain.attention import class_token_maps
from cait_jax.export import stablehlo
from cait_jax.export.forward import Exported, to_export
from cait_jax.export.stablehlo import PROGRAM, WEIGHTS, export_stablehlo, load_exported, program

pytest.importorskip("flatbuffers", reason="JAX serialises programs by flatbuffers")
PLAIN = re.compile(r"```python\n(import jax\n.*?)```", re.DOTALL)


def exported_of(name, **options):
    model, variables, preprocessing = network(name)
    given = {"uint8": False, "attention": False, "stacked": True, **options}
    return to_export(model, variables, preprocessing, **given)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "vit", NETWORKS))
def test_a_program_gives_what_its_network_gives_for_any_batch(name):
    exported = exported_of(name)
    weights = flatten_dict(dict(exported.variables), sep="/")
    call = jax_export.deserialize(bytearray(program(exported))).call
    model, variables, _ = network(name)
    for number in (1, 3):
        batch = images(name, number)
        (found,) = call(weights, batch)
        expected = model.apply(variables, batch)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["cait", "registers"])
def test_a_program_holds_no_kernel_and_is_lowered_for_every_platform(name):
    model, variables, preprocessing = network(name)
    model = model.clone(attention="pallas_tpu") if model.talking_heads else model
    exported = to_export(
        model, variables, preprocessing, uint8=False, attention=False, stacked=True
    )
    lowered = jax_export.deserialize(bytearray(program(exported)))
    assert lowered.platforms == ("cpu", "cuda", "tpu")
    assert str(lowered.in_avals[-1].shape[0]) == "batch"
    called = set(re.findall(r"custom_call @(\w+)", lowered.mlir_module()))
    assert called <= {"shape_assertion"}


@pytest.mark.parametrize("name", ["cait", slow("distilled"), slow("late")])
def test_attention_is_the_last_layers_as_a_mean_over_heads(name):
    exported = exported_of(name, attention=True)
    assert not exported.model.stacked
    logits, maps = jax.jit(exported.function)(exported.variables, images(name))
    model, variables, _ = network(name)
    expected, inside = forward_intermediates(model, variables, images(name))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    last = class_token_maps(model, inside)[-1].mean(axis=1)
    np.testing.assert_allclose(maps, last, rtol=1e-4, atol=1e-6)


def test_uint8_images_are_normalised_in_the_graph():
    exported = exported_of("cait", uint8=True)
    crops = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    (found,) = jax.jit(exported.function)(exported.variables, crops)
    model, variables, preprocessing = network("cait")
    images = dataclasses.replace(preprocessing, crop_pct=1.0)(crops)
    np.testing.assert_allclose(found, model.apply(variables, images), atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished export with attention, compared in another process."""
    target = tmp_path_factory.mktemp("exported") / "cait"
    model, variables, preprocessing = network("cait")
    report = export_stablehlo(
        target, model, variables, preprocessing=preprocessing, label_names="abcde", attention=True
    )
    return target, report


@pytest.mark.slow
def test_a_folder_is_compared_in_a_new_process(folder):
    target, report = folder
    by_platform = {check.platform: check for check in report.checks}
    assert by_platform["cpu"].difference <= 1e-5
    assert by_platform["cpu"].ms_an_image > 0
    assert by_platform["tpu"].difference is None
    assert by_platform["tpu"].why == "JAX finds no tpu device here"
    assert "2 images of noise" in report.compared
    assert sorted(file.name for file in target.iterdir()) == ["export.json", PROGRAM, WEIGHTS]
    assert report.program_bytes == (target / PROGRAM).stat().st_size
    described = json.loads((target / "export.json").read_text())
    assert described["label_names"] == list("abcde")
    assert described["preprocessing"]["crop_pct"] == 0.9
    assert described["input"]["shape"] == ["batch", 32, 32, 3]
    assert described["outputs"] == ["logits", "attention"]
    assert "blocks_1" in " ".join(load_file(target / WEIGHTS))


@pytest.mark.slow
def test_a_folder_is_loaded_with_and_without_this_package(folder, tmp_path):
    target, _ = folder
    model, variables, _ = network("cait")
    expected = model.apply(variables, images("cait", 2))
    logits, maps = load_exported(target)(images("cait", 2))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    assert maps.shape == (2, 2, 2)
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (code,) = PLAIN.findall(page)
    assert "cait_jax" not in code
    np.save(tmp_path / "images.npy", images("cait", 2))
    code = code.replace('"exported', f'"{target}')
    code = re.sub(r"^images = .*$", "images = np.load('images.npy')", code, flags=re.MULTILINE)
    code = f"import sys\nsys.modules['cait_jax'] = None\n{code}\nnp.save('found.npy', logits)\n"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), logits, atol=1e-6)


@pytest.mark.slow
def test_a_network_that_comes_back_different_is_not_put_in_place(tmp_path, monkeypatch):
    model, variables, preprocessing = network("cait")
    target = tmp_path / "exported"
    write = stablehlo.safetensors_writer
    spoilt = {"params/head/bias": np.ones(5, np.float32)}
    monkeypatch.setattr(stablehlo, "safetensors_writer", lambda weights: write(weights | spoilt))
    with pytest.raises(UserError, match=r"differs from the original by .* nothing was written"):
        export_stablehlo(target, model, variables, preprocessing=preprocessing)
    assert not list(tmp_path.iterdir())


def test_what_does_not_go_together_is_refused(tmp_path):
    model, variables, preprocessing = network("mean")
    with pytest.raises(UserError, match="no class token"):
        export_stablehlo(tmp_path, model, variables, preprocessing=preprocessing, attention=True)
    with pytest.raises(UserError, match="preprocessing, which is not known"):
        export_stablehlo(tmp_path, model, variables, uint8=True)
    with pytest.raises(UserError, match="4 label names"):
        export_stablehlo(tmp_path, model, variables, label_names="abcd")
    with pytest.raises(UserError, match="export the model again"):
        load_exported(tmp_path)


def test_an_export_says_what_goes_in_and_comes_out():
    model, variables, preprocessing = network("headless")
    exported = Exported(model, variables, preprocessing)
    assert exported.image_shape == (32, 32, 3)
    assert exported.output_names == ("features",)
