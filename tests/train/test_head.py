"""A head fitted on features that are computed once."""

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trees import assert_same_bits, random_params, unstack_blocks

from cait_jax import Preprocessing, UserError, create_model, save_pretrained
from cait_jax.data.folder import load_folder
from cait_jax.train import head
from cait_jax.train.finetune import folder_config
from cait_jax.train.head import FolderFeatures, fit_head
from cait_jax.train.setup import build

PREPARE = Preprocessing((16, 16), crop_pct=0.9)


def blobs(classes, count, spread, width=6, seed=0):
    """Features around a centre for each class, in an order that mixes them, on scales that differ."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, width))
    labels = np.tile(np.arange(classes), count)
    features = centres[labels] + spread * rng.standard_normal((len(labels), width))
    return np.float32(features * 10.0 ** np.arange(-2, width - 2) + 3), labels


def probabilities(fitted, features):
    logits = np.float64(features) @ np.float64(fitted.kernel) + fitted.bias
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_head_is_the_regression_on_standardised_features(classes):
    features, labels = blobs(classes, 40, 1.0)
    fitted = fit_head(features, labels, classes, seed=0)
    expected = make_pipeline(
        StandardScaler(), LogisticRegression(C=fitted.inverse_l2, max_iter=10_000)
    ).fit(features, labels)
    np.testing.assert_allclose(
        probabilities(fitted, features), expected.predict_proba(features), rtol=0, atol=1e-4
    )
    assert fitted.accuracy(features, labels) == expected.score(features, labels)
    assert fitted.kernel.dtype == fitted.bias.dtype == np.float32


def test_the_strength_follows_the_noise():
    clear, noise = (fit_head(*blobs(3, 30, spread), 3).inverse_l2 for spread in (0.1, 30.0))
    assert noise < 0.01 < 1 <= clear


def test_few_images_and_classes_without():
    features, labels = blobs(3, 1, 0.1)
    fitted = fit_head(features, labels, 5)
    assert fitted.inverse_l2 == 1.0
    assert fitted.kernel.shape == (6, 5)
    assert fitted.accuracy(features, labels) == 1.0
    np.testing.assert_allclose(probabilities(fitted, features)[:, 3:], 0, atol=1e-12)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path


@pytest.fixture(scope="module")
def network():
    model = create_model(
        "cait_nano4_patch4_8", image_size=16, in_channels=3, num_classes=0, depth=1, width=16
    )
    return model, {"params": random_params(model)}


def of(network, folder, prepare=PREPARE, **options):
    records = load_folder(folder, "train").records
    return FolderFeatures(*network, prepare, folder / "features.npz").of(records, **options)


def refuse(monkeypatch):
    def none(*_, **__):
        raise AssertionError("features are computed again")

    monkeypatch.setattr(head, "run_over_photographs", none)


def test_features_are_the_networks_and_are_kept(network, folder, monkeypatch):
    done = []
    features, labels, broken = of(network, folder, batch_size=4, progress=done.append)
    paths = sorted((folder / "train").rglob("*.png"))
    model, variables = network
    np.testing.assert_allclose(features, model.apply(variables, PREPARE(paths)), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
    assert broken == ()
    assert sum(done) == 6

    (folder / "train/a/0.png").rename(folder / "train/a/9.png")  # the same contents
    (folder / "train/b/copy.png").write_bytes((folder / "train/b/0.png").read_bytes())
    with monkeypatch.context() as patch:
        refuse(patch)
        again, labels, _ = of(network, folder)
    np.testing.assert_array_equal(again, features[[1, 2, 0, 3, 4, 5, 3]])
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1, 1])

    Image.new("RGB", (20, 24)).save(folder / "train/b/0.png")
    changed, _, _ = of(network, folder)
    assert np.abs(changed[3] - features[3]).max() > 1e-3
    np.testing.assert_array_equal(changed[[0, 1, 2]], again[[0, 1, 2]])


@pytest.mark.parametrize("what", ["weights", "preprocessing", "damaged"])
def test_features_of_another_network_are_not_taken(what, network, folder):
    before, _, _ = of(network, folder)
    model, variables = network
    prepare = PREPARE
    if what == "weights":
        variables = {"params": random_params(model, seed=1)}
    elif what == "preprocessing":
        prepare = Preprocessing((16, 16), crop_pct=0.5)
    else:
        file = folder / "features.npz"
        file.write_bytes(file.read_bytes()[:-40])
    found, _, _ = of((model, variables), folder, prepare)
    same = bool(np.array_equal(found, before))
    assert same == (what == "damaged")


def test_a_broken_image_is_left_out_and_named(network, folder):
    whole, _, _ = of(network, folder)
    (folder / "train/a/1.png").write_bytes(b"no picture")
    features, labels, broken = of(network, folder)
    np.testing.assert_array_equal(features, whole[[0, 2, 3, 4, 5]])
    np.testing.assert_array_equal(labels, [0, 0, 1, 1, 1])
    ((path, reason),) = broken
    assert path == folder / "train/a/1.png"
    assert reason
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none of the 6 images in .* can be read"):
        of(network, folder)


def test_what_was_known_before_does_not_change_the_bits(network, folder):
    """As of a command that was stopped while it computed features."""
    whole, _, _ = of(network, folder, batch_size=4)
    store = folder / "features.npz"
    with np.load(store) as file:
        saved = dict(file)
    for name in ("sha256", "features"):
        saved[name] = saved[name][[4, 1, 2]]
    np.savez(store, **saved)
    again, _, _ = of(network, folder, batch_size=4)
    np.testing.assert_array_equal(again, whole)


def starting(network, folder):
    """A config that trains the last block of the network on the folder, after a fitted head."""
    model, variables = network
    (folder / "val").symlink_to(folder / "train")
    settings = {"image_size": [16, 16], "crop_pct": 0.9, "channels": 3}
    save_pretrained(folder / "start", model, variables, preprocessing=settings | IMAGENET)
    return folder_config(folder, str(folder / "start"), what="two-phase", epochs=1.0)


IMAGENET = {"mean": list(PREPARE.mean), "std": list(PREPARE.std)}


def test_a_run_starts_with_the_fitted_head(network, folder):
    config = starting(network, folder)
    state = build(config, jax.devices()[:1]).init_state(folder)
    features, labels, _ = of(network, folder)
    fitted = fit_head(features, labels, 2)
    np.testing.assert_allclose(state.params["head"]["kernel"], fitted.kernel, rtol=0, atol=1e-4)
    np.testing.assert_allclose(state.params["head"]["bias"], fitted.bias, rtol=0, atol=1e-4)
    body = {name: layer for name, layer in state.params.items() if name != "head"}
    assert_same_bits(jax.device_get(body), jax.device_get(unstack_blocks(network[1]["params"])))
    assert_same_bits(
        build(config, jax.devices()[:1]).init_state().params, state.params
    )  # from features anew


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"data.name": "synthetic"}, r"of a folder of images, and synthetic is none: set .*=False"),
        ({"init.weights": None}, r"fit_head computes features by weights that are learnt"),
        ({"objective": "dino"}, r"fit_head is for --config\.objective=supervised"),
    ],
)
def test_a_head_that_cannot_be_fitted_is_a_sentence(overrides, sentence, network, folder):
    config = starting(network, folder)
    config.update_from_flattened_dict(overrides)
    if config.data.name == "synthetic":
        config.data.eval_split = "validation"
    with pytest.raises(UserError, match=sentence):
        build(config, jax.devices()[:1])
