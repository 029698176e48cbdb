"""Masked autoencoding against numpy, on meshes and with accumulation, through the loop and into a classifier."""

import contextlib
import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from feature_commands import check_feature_commands
from jax.sharding import NamedSharding, PartitionSpec
from marks import slow
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from trees import assert_same_bits, random_params

from cait_jax import UserError, create_model, load_pretrained
from cait_jax.augment.pipeline import Augmentation
from cait_jax.data.in_memory import load_digits
from cait_jax.models.inspect import forward_intermediates
from cait_jax.sharding import (
    batch_sharding,
    constrain_batch,
    make_mesh,
    param_shardings,
    put_batch,
    replicated,
)
from cait_jax.train import loop, train
from cait_jax.train.config import check_values
from cait_jax.train.objectives.mae import Decoder, Mae
from cait_jax.train.objectives.patches import patchify, ranks, shuffle, sin_cos, unpatchify
from cait_jax.train.optimizer import decay_mask, make_optimizer
from cait_jax.train.setup import build
from cait_jax.train.step import create_state, make_train_step
from cait_jax.weights.pretrained import load_model
from configs import digits

BATCH, PATCHES, MASKED = 16, 16, 11


def network(dtype="float32", **overrides):
    """Of images of 8 pixels in 16 patches of 2."""
    attributes = {
        "num_classes": 3, "in_channels": 3, "patch_size": 2, "depth": 2, "class_depth": 1, "width": 16,
        "num_heads": 2, "dtype": dtype, "param_dtype": dtype, "precision": "highest",
    }  # fmt: skip
    return create_model("cait_nano4_patch4_8", **(attributes | overrides))


def objective_of(model, **overrides):
    decoder = Decoder(
        image_size=model.image_size, patch_size=model.patch_size, in_channels=model.in_channels,
        width=8, depth=1, num_heads=2, num_classes=0, dtype=model.dtype,
        param_dtype=model.param_dtype, precision="highest",
    )  # fmt: skip
    settings = {"masked": MASKED, "mean": (0.5,), "std": (0.25,), "visible_weight": 0.25}
    return Mae(model, decoder, **(settings | overrides))


def images_of(count=BATCH, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def filled(objective, seed=0):
    """Parameters far from their start values."""
    images = jnp.zeros((1, *objective.model.image_size, objective.model.in_channels))
    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0), images)[0])
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        near_one = path[-1].key in ("gamma", "scale")
        return jnp.asarray(near_one + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


# Against numpy


def cut(image, side):
    """The patches of an image, by loops."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    return np.stack(
        [
            image[r * side : (r + 1) * side, c * side : (c + 1) * side].reshape(-1)
            for r in range(rows)
            for c in range(columns)
        ]
    )


def test_patches_are_cut_row_by_row():
    images = np.random.default_rng(0).standard_normal((2, 6, 9, 2)).astype(np.float32)
    found = patchify(jnp.asarray(images), 3)
    np.testing.assert_array_equal(found, [cut(image, 3) for image in images])
    np.testing.assert_array_equal(unpatchify(found, (6, 9), 3), images)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_the_loss_is_that_of_masked_patches(norm_pixels):
    objective = objective_of(network(), norm_pixels=norm_pixels)
    rng = np.random.default_rng(1)
    images = rng.standard_normal((3, 8, 8, 3)).astype(np.float32)
    order = np.stack([rng.permutation(PATCHES) for _ in images])
    predicted = rng.standard_normal((3, PATCHES, 12)).astype(np.float32)
    masked, visible = objective.errors(
        jnp.asarray(predicted), jnp.asarray(images), jnp.asarray(order)
    )
    for i, image in enumerate(images):
        target = cut(image, 2).astype(np.float64)
        if norm_pixels:
            mean, variance = target.mean(1, keepdims=True), target.var(1, ddof=1, keepdims=True)
            target = (target - mean) / np.sqrt(variance + 1e-6)
        error = ((predicted[i] - target) ** 2).mean(1)
        np.testing.assert_allclose(masked[i], error[order[i][-MASKED:]].mean(), rtol=1e-5)
        np.testing.assert_allclose(visible[i], error[order[i][:-MASKED]].mean(), rtol=1e-5)

    params, keys = filled(objective), dict.fromkeys(objective.rngs, jax.random.key(2))
    batch = {"image": jnp.asarray(images), "order": jnp.asarray(order), "id": jnp.arange(3)}
    loss, aux = objective.loss(params, {}, batch, keys, jnp.int32(0))
    images, order = batch["image"], batch["order"]
    parts = objective.errors(objective.predict(params, images, order), images, order)
    np.testing.assert_allclose(loss, parts[0].mean() + 0.25 * parts[1].mean(), rtol=1e-6)
    assert aux["metrics"]["masked_mse"] == pytest.approx(float(parts[0].mean()), rel=1e-6)


def test_a_flat_patch_has_a_finite_target_and_gradient():
    objective = objective_of(network())
    images, order = jnp.ones((1, 8, 8, 3)), jnp.arange(PATCHES)[None]
    np.testing.assert_array_equal(objective.target(images), 0)
    gradient = jax.grad(
        lambda params: objective.errors(objective.predict(params, images, order), images, order)[0][
            0
        ]
    )(filled(objective))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_positions_are_sines_and_cosines_of_row_and_column():
    found = sin_cos(2, 3, 8)
    expected = []
    for row in range(2):
        for column in range(3):
            half = lambda x: [f(x / 10_000 ** (i / 2)) for f in (np.sin, np.cos) for i in (0, 1)]  # noqa: E731
            expected.append(half(row) + half(column))
    np.testing.assert_allclose(found, expected, atol=1e-15)
    assert len({tuple(each) for each in found.round(6)}) == 6


def layer_norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6)
    return normed * np.asarray(params["scale"]) + np.asarray(params["bias"])


def affine(x, params):
    return x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


def test_the_decoder_puts_each_visible_token_back_in_its_place():
    """With blocks that add nothing each patch is drawn from its own token alone."""
    objective = objective_of(network())
    params = filled(objective)["decoder"]
    for branch in (params["blocks"]["attn"]["proj"], params["blocks"]["mlp"]["fc2"]):
        branch.update(jax.tree.map(jnp.zeros_like, branch))
    rng = np.random.default_rng(3)
    order = np.stack([rng.permutation(PATCHES) for _ in range(2)])
    tokens = rng.standard_normal((2, PATCHES - MASKED, 16)).astype(np.float32)
    found = objective.decoder.apply(
        {"params": params}, jnp.asarray(tokens), ranks(jnp.asarray(order))
    )
    for i in range(2):
        for patch in range(PATCHES):
            place = list(order[i]).index(patch)
            x = np.asarray(params["mask_token"])[0, 0]
            if place < PATCHES - MASKED:
                x = affine(layer_norm(tokens[i, place], params["encoder_norm"]), params["embed"])
            x = layer_norm(x + sin_cos(4, 4, 8)[patch], params["norm"])
            np.testing.assert_allclose(
                found[i, patch], affine(x, params["pixels"]), rtol=1e-3, atol=1e-4
            )


# The encoder


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("cait_nano4_patch4_8", {}),
        ("cait_nano4_patch4_8", {"class_token": "mean"}),
        ("cait_nano4_patch4_8", {"class_token": 1}),
        ("vit_small", {"image_size": 8, "class_depth": None}),
        ("deit_small_distilled", {"image_size": 8, "class_depth": None}),
    ],
)
def test_all_patches_visible_are_the_self_attention_stage(name, overrides):
    given = {"class_depth": 1} | overrides
    if "class_token" in given:
        given["class_depth"] = None
    model = create_model(
        name, **{"num_classes": 3, "in_channels": 3, "patch_size": 2, "depth": 2, "width": 16, "num_heads": 2,
                 "precision": "highest", **given},
    )  # fmt: skip
    variables = {"params": random_params(model)}
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), jnp.float32)
    features = forward_intermediates(model, variables, images)[1]["blocks"]
    last = features[-1] if isinstance(features, list) else {"features": features["features"][-1]}
    expected = last["features"][:, -PATCHES:]
    rng = np.random.default_rng(1)
    order = jnp.asarray(np.stack([rng.permutation(PATCHES) for _ in range(2)]))
    found = model.apply(variables, images, visible=order)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(found), np.asarray(ranks(order))[..., None], 1),
        expected, rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_masked_pixels_are_not_seen():
    objective = objective_of(network())
    params = filled(objective)
    order = jnp.asarray(np.random.default_rng(0).permutation(PATCHES))[None]
    image = np.random.default_rng(1).standard_normal((1, 8, 8, 3)).astype(np.float32)
    other = image.copy()
    for patch in np.asarray(order)[0, -MASKED:]:
        row, column = divmod(int(patch), 4)
        other[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    first, second = (objective.predict(params, jnp.asarray(x), order) for x in (image, other))
    np.testing.assert_array_equal(first, second)


def test_parameters_start_as_the_classifiers_and_kernels_alone_decay():
    objective = objective_of(network())
    images = jnp.zeros((1, 8, 8, 3))
    params, carried = objective.init(jax.random.key(5), images)
    whole = objective.model.init(jax.random.key(5), images)["params"]
    assert set(params["encoder"]) == {"patch_embed", "pos_embed", "blocks"}
    assert_same_bits(params["encoder"], {name: whole[name] for name in params["encoder"]})
    assert carried == {}
    decays = decay_mask(params)["decoder"]
    assert not decays["mask_token"]
    assert decays["pixels"] == {"kernel": True, "bias": False}


# Devices and micro batches


def prepared(devices, objective):
    rows = batch_sharding(make_mesh(jax.devices()[:devices]))
    prepare = jax.jit(
        lambda batch, key: objective.prepare(batch, dict.fromkeys(objective.rngs, key))
    )
    return jax.device_get(prepare(put_batch({"image": images_of()}, rows), jax.random.key(7)))


def test_masks_are_permutations_that_do_not_depend_on_devices():
    objective = objective_of(network(), augmentation=Augmentation(hflip=True, pad_crop=1))
    one, eight = prepared(1, objective), prepared(8, objective)
    assert_same_bits(one["order"], eight["order"])
    np.testing.assert_allclose(one["image"], eight["image"], rtol=1e-6)
    assert (np.sort(one["order"], axis=1) == np.arange(PATCHES)).all()
    assert len({tuple(order) for order in one["order"]}) == BATCH


def test_every_patch_is_masked_as_often():
    order = shuffle(jax.random.key(0), jnp.arange(4000), PATCHES)
    masked = (ranks(order) >= PATCHES - MASKED).mean(axis=0)
    np.testing.assert_allclose(masked, MASKED / PATCHES, atol=4 * np.sqrt(0.25 / 4000))


def run(devices, steps=20, accumulate=1, dtype="float32", **axes):
    """Losses of each step, on a mesh with `axes` beside `data`."""
    model = network(dtype, drop_path_rate=0.2, dropout=0.1, embedding_dropout=0.1)
    augmentation = Augmentation(hflip=True, pad_crop=1)
    objective = objective_of(model, augmentation=augmentation)
    schedule = optax.warmup_cosine_decay_schedule(1e-6, 1e-3, 2, steps, end_value=1e-5)
    optimizer = make_optimizer(schedule, clip_norm=1.0)
    mesh = make_mesh(jax.devices()[:devices], **axes)
    whole, rows = replicated(mesh), batch_sharding(mesh)

    def init():
        return create_state(filled(objective), optimizer, ema=False)

    shardings = param_shardings(jax.eval_shape(init), mesh)
    train_step = make_train_step(optimizer, schedule, seed=3, grad_accum=accumulate)
    step = jax.jit(
        constrain_batch(train_step, mesh),
        in_shardings=(shardings, rows, whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    state = jax.jit(init, out_shardings=shardings)()
    losses = []
    for number in range(steps):
        batch = put_batch({"image": images_of(seed=number)}, rows)
        state, metrics = step(state, batch, objective)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def alone():
    return run(1)


@pytest.mark.parametrize(("count", "accumulate"), [slow(8, 1), slow(8, 2), (2, 4)])
def test_losses_do_not_depend_on_devices_or_micro_batches(alone, count, accumulate):
    np.testing.assert_allclose(run(count, accumulate=accumulate), alone, rtol=1e-5)
    assert alone[-1] < alone[0]


@pytest.mark.slow
def test_losses_do_not_depend_on_how_parameters_are_sharded(alone):
    np.testing.assert_allclose(run(8, fsdp=2, tensor=2), alone, rtol=1e-5)


@pytest.mark.slow
def test_a_loss_and_its_gradient_are_the_same_under_explicit_mesh_axes():
    objective = objective_of(network(), augmentation=Augmentation(hflip=True, pad_crop=1))

    def loss(params, images):
        keys = dict.fromkeys(objective.rngs, jax.random.key(1))
        prepared = objective.prepare({"image": images}, keys)
        return objective.loss(params, {}, prepared, keys, jnp.int32(0))[0]

    params, images = filled(objective), jnp.asarray(images_of())
    expected = jax.jit(jax.value_and_grad(loss))(params, images)
    mesh = jax.make_mesh((4,), ("data",))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        images = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(jax.value_and_grad(loss))(params, images)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


@pytest.mark.slow
def test_float64_agrees_to_its_own_rounding_on_eight_devices():
    with jax.enable_x64(True):
        one, eight = (run(n, 20, accumulate, "float64") for n, accumulate in ((1, 1), (8, 2)))
    np.testing.assert_allclose(one, eight, rtol=1e-10, atol=0)


def evaluated(objective, params, devices, size, count=11):
    """The evaluator's result on `count` images in batches of `size`."""
    images = images_of(count)
    batches = []
    for start in range(0, count, size):
        rows = images[start : start + size]
        padding = size - len(rows)
        rows = np.concatenate([rows, np.zeros((padding, 8, 8, 3), np.uint8)])
        mask = np.arange(size) < size - padding
        batches.append({"image": rows, "mask": mask, "label": np.zeros(size, np.int32)})
    return objective.evaluator(make_mesh(jax.devices()[:devices]))({"": params}, batches)[""]


def test_evaluation_counts_every_image_once_with_its_own_mask():
    objective = objective_of(network(), seed=4)
    params = filled(objective)
    images = (images_of(11).astype(np.float32) / 255 - 0.5) / 0.25
    key = jax.random.fold_in(jax.random.key(4), 2**32 - 1)
    losses = []
    for number, image in enumerate(jnp.asarray(images)):
        order = jax.random.permutation(jax.random.fold_in(key, number), PATCHES)[None]
        pixels = objective.predict(params, image[None], order)
        masked, visible = objective.errors(pixels, image[None], order)
        losses.append(float(masked[0] + 0.25 * visible[0]))
    for devices, size in ((1, 11), (1, 4), (8, 8)):
        found = evaluated(objective, params, devices, size)
        assert found == {"loss": pytest.approx(np.mean(losses), rel=1e-5)}
    other = evaluated(dataclasses.replace(objective, seed=5), params, 1, 11)
    assert other["loss"] != pytest.approx(np.mean(losses), rel=1e-5)


# Runs


@pytest.mark.slow
def test_a_run_is_evaluated_by_the_neighbours_of_its_mean_tokens(pretrained):
    _, run = pretrained
    trainer = build(small_config())
    params = jax.tree.map(jnp.asarray, jax.device_get(run.state.params))
    model = trainer.model

    def features(split):
        mean, std = np.float32(trainer.config.data.mean), np.float32(trainer.config.data.std)
        images = jnp.asarray((np.float32(split.images) / 255 - mean) / std)
        order = jnp.tile(jnp.arange(16), (len(images), 1))
        tokens = model.apply({"params": params["encoder"]}, images, visible=order)
        x = np.float64(tokens)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        norm = params["decoder"]["encoder_norm"]
        return (x * np.float64(norm["scale"]) + np.float64(norm["bias"])).mean(1)

    def weights(far):
        return np.exp((far.min(1, keepdims=True) - far) / 0.07)

    neighbours = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights)
    neighbours.fit(features(trainer.train_split), trainer.train_split.labels)
    expected = neighbours.score(features(trainer.eval_split), trainer.eval_split.labels)
    assert run.metrics["eval/knn_accuracy"] == pytest.approx(expected, abs=2 / 360)
    assert expected > 0.2  # after 24 steps


def small_config():
    config = digits.get_config()
    config.objective = "mae"
    config.model.patch_size, config.model.width, config.model.depth = 2, 16, 2
    config.model.num_heads, config.model.class_depth = 2, 1
    config.mae.decoder_width, config.mae.decoder_depth, config.mae.decoder_heads = 8, 1, 2
    config.batch_size, config.steps, config.optimizer.grad_accum = 32, 24, 2
    config.optimizer.warmup_epochs, config.optimizer.learning_rate = 0.0, 3e-3
    config.optimizer.ema_decay = 0.9
    config.eval.every_epochs = 8 * 32 / 1437
    config.checkpoint.every_steps = 5
    return config


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mae") / "run"
    return workdir, train(small_config(), workdir)


def test_a_run_learns_and_resumes_to_the_same_bits(pretrained, tmp_path, monkeypatch):
    workdir, whole = pretrained
    names = ("loss", "knn_accuracy", "feature_rank", "feature_std")
    assert set(whole.metrics) == {f"eval/{ema}{name}" for ema in ("", "ema_") for name in names}
    assert whole.metrics["eval/loss"] < 0.98 * evaluations(workdir)[0]
    stop = contextlib.nullcontext(lambda step: step == 13)
    monkeypatch.setattr(loop, "stop_signal", lambda: stop)
    assert not train(small_config(), tmp_path / "parts").finished
    monkeypatch.undo()
    config = small_config()
    config.mae.pictures_every_epochs = 1.0  # may change
    resumed = train(config, tmp_path / "parts")
    assert_same_bits(resumed.state, whole.state)
    assert resumed.metrics == pytest.approx(whole.metrics, abs=0)


def test_pictures_are_drawn_of_the_mask_and_what_is_made_of_it(pretrained, tmp_path):
    """Rows of 8 images of 96 pixels, 4 apart: original, visible part on grey, reconstruction."""
    config = small_config()
    config.mae.pictures_every_epochs = 12 * 32 / 1437
    drawn = train(config, tmp_path)
    assert_same_bits(drawn.state, pretrained[1].state)
    folder = tmp_path / "reconstructions"
    assert sorted(path.name for path in folder.iterdir()) == ["step_12.png", "step_24.png"]
    picture = np.asarray(Image.open(folder / "step_24.png"))
    assert picture.shape == (3 * 100 - 4, 8 * 100 - 4)
    tiles = [
        [picture[100 * r : 100 * r + 96, 100 * i : 100 * i + 96][::12, ::12] for i in range(8)]
        for r in range(3)
    ]
    images = load_digits("test", (8, 8)).images[:8, :, :, 0]
    for image, original, visible, reconstruction in zip(images, *tiles, strict=True):
        np.testing.assert_array_equal(original, image)
        grey = np.abs(visible.astype(int) - image) > 0
        masked = grey.reshape(4, 2, 4, 2).any(axis=(1, 3)).repeat(2, 0).repeat(2, 1)
        assert (visible[masked] == 128).all()
        assert masked.mean() == 0.75
        np.testing.assert_array_equal(reconstruction[~masked], image[~masked])
        assert (reconstruction[masked] != visible[masked]).any()


def evaluations(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["eval/loss"] for row in rows if "eval/loss" in row]


def classifier_config(workdir):
    config = small_config()
    config.objective = "supervised"
    config.mae = digits.get_config().mae
    config.init.weights = str(workdir)
    return config


@pytest.mark.parametrize("ema", [False, True])
def test_a_classifier_starts_from_the_encoder(pretrained, caplog, ema):
    workdir, run = pretrained
    config = classifier_config(workdir)
    config.init.ema = ema
    trainer = build(config)
    with caplog.at_level(logging.WARNING, "cait_jax"):
        params = trainer.init_state().params
    (message,) = [record.getMessage() for record in caplog.records]
    assert (
        "dropped its decoder; initialised from seed 0: blocks_token_only_0, cls_token, head, norm"
        in message
    )
    assert str(workdir) in message
    encoder = (run.state.ema if ema else run.state.params)["encoder"]
    assert_same_bits({name: params[name] for name in encoder}, encoder)
    config.init.weights = None
    config.init.ema = False
    scratch = build(config).init_state().params
    fresh = params.keys() - encoder.keys()
    assert_same_bits({n: params[n] for n in fresh}, {n: scratch[n] for n in fresh})


def test_a_classifier_of_another_size_stacking_and_class_attention_starts_from_it(pretrained):
    workdir, run = pretrained
    config = classifier_config(workdir)
    config.model.stacked, config.model.class_depth = False, 2
    params = build(config).init_state().params
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], run.state.params["encoder"]["blocks"])
        assert_same_bits(params[f"blocks_{i}"], block)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", 32, "of another shape"),
        ("depth", 3, "missing"),
        ("depth", 1, "left over"),
        ("talking_heads", False, "left over"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(pretrained, key, value, message):
    config = classifier_config(pretrained[0])
    config.model[key] = value
    with pytest.raises(UserError, match=message) as caught:
        build(config).init_state()
    assert str(pretrained[0]) in str(caught.value)


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_is_read_as_the_network_of_its_features(pretrained, ema):
    workdir, run = pretrained
    model, variables = load_pretrained(workdir, ema=ema)
    assert model == load_model(workdir)
    assert (model.class_token, model.num_classes) == ("mean", 0)
    images = jnp.linspace(-1, 1, 2 * 64).reshape(2, 8, 8, 1)
    objective = build(small_config()).objective
    expected = objective.features(run.state.ema if ema else run.state.params, images)
    np.testing.assert_allclose(model.apply(variables, images), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_commands_measure_and_write_the_features_of_a_run(pretrained, tmp_path):
    workdir, run = pretrained
    check_feature_commands(run, workdir, tmp_path)


def test_a_run_whose_network_has_a_class_token_is_no_classifier(tmp_path):
    config = small_config()
    config.model.class_token, config.model.class_depth = "input", None
    config.steps, config.eval.every_epochs = 2, 1e9
    train(config, tmp_path)
    for load in (load_pretrained, load_model):
        with pytest.raises(
            UserError, match=r"class token, which .* learnt without labels \(mae\).*init\.weights="
        ) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


# What is refused


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("augment.mixup", 0.8, "--config.augment.mixup=0"),
        ("augment.reprob", 0.25, "--config.augment.reprob=0"),
        ("distill.kind", "hard", "has no teacher"),
        ("init.weights", "runs/other", "leave out --config.init.weights"),
        ("optimizer.layer_decay", 0.75, "--config.optimizer.layer_decay=1"),
        ("report.inspect_every", 10, "--config.report.inspect_every"),
        ("objective", "supervised", "set that, or leave them out"),
    ],
)
def test_settings_without_an_effect_are_refused(key, value, message):
    config = small_config()
    section, _, last = key.rpartition(".")
    (config[section] if section else config)[last] = value
    with pytest.raises(UserError, match=message):
        check_values(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mae.mask_ratio", 0.01, "masks 0 of an image's 16 patches"),
        ("mae.mask_ratio", 0.99, "masks 16 of an image's 16 patches"),
        ("mae.decoder_width", 10, "must be a multiple of 4"),
        ("mae.decoder_heads", 3, "must be a multiple of 4, for its positions, and of"),
        ("model.name", "regnety_160", "choose a transformer"),
    ],
)
def test_what_cannot_be_masked_or_decoded_is_refused(key, value, message):
    config = small_config()
    section, _, last = key.rpartition(".")
    if key == "model.name":
        config = digits.get_config()
        config.objective, config.image_size = "mae", 8
    config[section][last] = value
    with pytest.raises(UserError, match=message):
        build(config)
