"""DINO: its formulas in numpy, the same numbers on any devices and in micro batches, stopped and resumed."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from feature_commands import check_feature_commands
from marks import slow
from sklearn.neighbors import KNeighborsClassifier
from trees import assert_same_bits

from cait_jax import UserError, create_model
from cait_jax.augment.crops import View
from cait_jax.models.layers import DtypePolicy
from cait_jax.sharding import batch_sharding, constrain_batch, make_mesh, put_batch, replicated
from cait_jax.train import train
from cait_jax.train.objectives.dino import (
    Dino,
    at_size,
    dino_loss,
    koleo_loss,
    teacher_probabilities,
)
from cait_jax.train.objectives.projection import ProjectionHead
from cait_jax.train.optimizer import make_optimizer
from cait_jax.train.setup import build
from cait_jax.train.step import create_state, make_train_step
from cait_jax.weights.adapt import resize_pos_embed
from cait_jax.weights.pretrained import load_pretrained
from configs import digits

BATCH, STEPS, OUTPUTS, LOCAL = 16, 20, 12, 2
RNG = np.random.default_rng(0)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def objective_of(dtype="float32", **settings):
    model = create_model(
        "cait_nano4_patch4_8", num_classes=0, depth=1, class_depth=1, width=16, num_heads=2,
        layer_scale_init=1.0, dtype=dtype, param_dtype=dtype, drop_path_rate=0.2, dropout=0.1,
        precision="highest",
    )  # fmt: skip
    view = View(size=(8, 8), scale=(0.5, 1.0))
    given = {
        "views": (view, dataclasses.replace(view, solarize=0.2), View(size=(4, 4), scale=(0.2, 0.5))),
        "local_crops": LOCAL, "total_steps": STEPS, "frozen_steps": 3, "teacher_temps": (0.04, 0.07),
        "warmup_steps": 10, "teacher_momentum": 0.9, "center_momentum": 0.8,
    } | settings  # fmt: skip
    dtypes = DtypePolicy(model.dtype, model.param_dtype, "highest")
    return Dino(model=model, head=ProjectionHead(32, 8, OUTPUTS, dtypes), **given)


def spread(params, seed=0):
    """Parameters large enough for outputs that differ."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype), params
    )


def batches(steps):
    for step in range(steps):
        rng = np.random.default_rng(step)
        yield {
            "image": rng.integers(0, 256, (BATCH, 8, 8, 1), dtype=np.uint8),
            "label": rng.integers(0, 10, BATCH, dtype=np.int32),
        }


def run(devices, steps=STEPS, accumulate=1, dtype="float32", **settings):
    """Metrics of each step, and the states before each and after the last."""
    objective = objective_of(dtype, **settings)
    schedule = optax.warmup_cosine_decay_schedule(1e-6, 1e-3, 2, STEPS, end_value=1e-5)
    optimizer = make_optimizer(schedule, clip_norm=1.0)
    mesh = make_mesh(devices)
    whole, rows = replicated(mesh), batch_sharding(mesh)
    step = jax.jit(
        constrain_batch(make_train_step(optimizer, schedule, seed=3, grad_accum=accumulate), mesh),
        in_shardings=(whole, rows, whole),
        out_shardings=(whole, whole),
    )

    def init():
        params, carried = objective.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        return params, carried

    params, carried = jax.device_get(jax.jit(init)())
    params, carried["teacher"] = spread(params), spread(params)
    state = jax.device_put(create_state(params, optimizer, ema=False, carried=carried), whole)
    states, metrics = [jax.device_get(state)], []
    for batch in batches(steps):
        state, values = step(state, put_batch(batch, rows), objective)
        metrics.append(jax.device_get(values))
        states.append(jax.device_get(state))
    return metrics, states


def losses(metrics):
    return [values["loss"] for values in metrics]


@pytest.fixture(scope="module")
def alone():
    return run(jax.devices()[:1])


@pytest.mark.parametrize("local", [0, 3])
def test_the_loss_is_the_papers_sum_over_pairs_of_other_crops(local):
    crops = 2 + local
    student, teacher = RNG.standard_normal((5, crops, 7)), RNG.standard_normal((5, 2, 7))
    center = RNG.standard_normal(7)
    of_teacher = np.exp(log_softmax((teacher - center) / 0.05))
    of_student = log_softmax(student / 0.1)
    expected, pairs = 0.0, 0
    for i in range(2):
        for j in range(crops):
            if i != j:
                expected += -(of_teacher[:, i] * of_student[:, j]).sum(-1).mean()
                pairs += 1
    probabilities = teacher_probabilities(jnp.float32(teacher), jnp.float32(center), 0.05)
    np.testing.assert_allclose(probabilities, of_teacher, rtol=1e-4, atol=1e-6)
    found = dino_loss(jnp.float32(student), probabilities, 0.1)
    assert found == pytest.approx(expected / pairs, rel=1e-5)


def prepared(objective, step, batch):
    """The crops of a step of `run`."""
    key = jax.random.fold_in(jax.random.key(3), step)
    keys = dict(zip(objective.rngs, jax.random.split(key, len(objective.rngs)), strict=True))
    return jax.jit(objective.prepare)(jax.tree.map(jnp.asarray, batch), keys)


def head_by_hand(params, features):
    x = np.asarray(features, np.float64)
    gelu = np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)
    for name in ("fc1", "fc2", "proj"):
        x = x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])
        x = x if name == "proj" else gelu(x)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    kernel = np.float64(params["last"]["kernel"])
    return x @ (kernel / np.linalg.norm(kernel, axis=0))


def test_teacher_and_center_follow_their_formulas(alone):
    metrics, states = alone
    objective = objective_of()
    for step, batch in enumerate(batches(STEPS)):
        before, after = states[step], states[step + 1]
        momentum = 1 - (1 - 0.9) * (math.cos(math.pi * step / STEPS) + 1) / 2
        jax.tree.map(
            lambda old, new, found, m=momentum: np.testing.assert_allclose(
                found, m * np.float64(old) + (1 - m) * np.float64(new), rtol=1e-5, atol=1e-7
            ),
            before.carried["teacher"],
            after.params,
            after.carried["teacher"],
        )
        if step % 7:
            continue
        teacher = jax.tree.map(jnp.asarray, before.carried["teacher"])
        crops = np.asarray(prepared(objective, step, batch)["global"], np.float32)
        images = jnp.asarray((crops.reshape(2 * BATCH, 8, 8, 1) / 255 - 0.5) / 0.5)
        outputs = head_by_hand(
            teacher["head"], objective.model.apply({"params": teacher["backbone"]}, images)
        )
        center = 0.8 * np.float64(before.carried["center"]) + 0.2 * outputs.mean(0)
        np.testing.assert_allclose(after.carried["center"], center, atol=2e-6)
        temperature = 0.04 + 0.03 * min(step / 10, 1)
        said = np.exp(log_softmax((outputs - np.float64(before.carried["center"])) / temperature))
        entropy = -(said * np.log(said)).sum(-1).mean()
        assert metrics[step]["teacher_entropy"] == pytest.approx(entropy, rel=1e-4)
        mean = said.mean(0)
        assert metrics[step]["mean_entropy"] == pytest.approx(
            -(mean * np.log(mean)).sum(), rel=1e-4
        )


def test_the_last_layer_is_frozen_at_first_and_its_columns_have_length_one(alone):
    def columns(state):
        kernel = np.float64(state.params["head"]["last"]["kernel"])
        return kernel / np.linalg.norm(kernel, axis=0)

    _, states = alone
    for step in range(3):
        np.testing.assert_allclose(columns(states[step + 1]), columns(states[step]), atol=1e-6)
    assert np.abs(columns(states[4]) - columns(states[3])).max() > 1e-5
    for name in ("fc1", "proj"):
        kernels = [state.params["head"][name]["kernel"] for state in states[1:3]]
        assert np.abs(kernels[1] - kernels[0]).max() > 1e-5

    params = jax.tree.map(jnp.asarray, states[-1].params["head"])
    features = jnp.asarray(RNG.standard_normal((4, 16)), jnp.float32)
    head = objective_of().head
    found = head.apply({"params": params}, features)
    np.testing.assert_allclose(found, head_by_hand(params, features), atol=2e-6)
    longer = {**params, "last": {"kernel": params["last"]["kernel"] * 3}}
    np.testing.assert_allclose(head.apply({"params": longer}, features), found, atol=2e-6)
    assert np.abs(found).max() <= 1 + 1e-6


def test_crops_are_the_same_on_eight_devices_and_differ_from_each_other():
    objective = objective_of()
    (batch,) = batches(1)
    one = prepared(objective, 0, batch)
    mesh = make_mesh(jax.devices()[:8])
    key = jax.random.fold_in(jax.random.key(3), 0)
    keys = dict(zip(objective.rngs, jax.random.split(key, 3), strict=True))
    prepare = jax.jit(constrain_batch(objective.prepare, mesh))
    eight = prepare(put_batch(batch, batch_sharding(mesh)), keys)
    assert_same_bits(jax.device_get(eight), jax.device_get(one))
    assert one["global"].shape == (BATCH, 2, 8, 8, 1)
    assert one["local"].shape == (BATCH, LOCAL, 4, 4, 1)
    assert one["global"].dtype == one["local"].dtype == jnp.uint8
    for crops in (one["global"], one["local"]):
        assert not np.array_equal(crops[:, 0], crops[:, 1])


@pytest.mark.parametrize(("count", "accumulate"), [(8, 1), slow(2, 2)])
def test_losses_and_center_do_not_depend_on_devices_or_micro_batches(alone, count, accumulate):
    metrics, states = run(jax.devices()[:count], accumulate=accumulate)
    np.testing.assert_allclose(losses(metrics), losses(alone[0]), rtol=1e-5)
    expected = alone[1][-1].carried["center"]
    np.testing.assert_allclose(states[-1].carried["center"], expected, atol=1e-5)


@pytest.mark.slow
def test_float64_agrees_to_1e_10_on_eight_devices():
    with jax.enable_x64(True):
        one, before = run(jax.devices()[:1], dtype="float64")
        eight, after = run(jax.devices()[:8], dtype="float64", accumulate=2)
    np.testing.assert_allclose(losses(one), losses(eight), rtol=1e-10, atol=0)
    centers = [states[-1].carried["center"] for states in (before, after)]
    assert centers[0].dtype == np.float64
    np.testing.assert_allclose(*centers, rtol=0, atol=1e-10)


def test_koleo_is_the_mean_log_distance_to_the_nearest():
    features = RNG.standard_normal((6, 5))
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1) + 10 * np.eye(6)
    expected = -np.log(distances.min(1)).mean()
    assert koleo_loss(jnp.float32(features)) == pytest.approx(expected, rel=1e-5)
    twins = jnp.ones((4, 5))
    value, gradient = jax.value_and_grad(koleo_loss)(twins)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_koleo_joins_the_loss_of_the_whole_step_on_any_devices():
    plain, _ = run(jax.devices()[:1], steps=1)
    one, _ = run(jax.devices()[:1], steps=1, koleo=0.5)
    four, _ = run(jax.devices()[:4], steps=1, koleo=0.5)
    assert one[0]["loss"] == pytest.approx(plain[0]["loss"] + 0.5 * one[0]["koleo"], rel=1e-5)
    assert four[0]["koleo"] == pytest.approx(one[0]["koleo"], rel=1e-5)


def test_positions_of_local_crops_are_resized_as_at_load_time_and_are_learnt():
    model = create_model("cait_nano4_patch4_8", num_classes=0, depth=1, width=16, image_size=16)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    small, resized = at_size(model, params, (8, 8))
    assert small.image_size == (8, 8)
    expected = resize_pos_embed(params["pos_embed"], (4, 4), (2, 2))
    np.testing.assert_allclose(resized["pos_embed"], expected, atol=1e-6)
    gradient = jax.grad(lambda params: at_size(model, params, (8, 8))[1]["pos_embed"].sum())(params)
    np.testing.assert_allclose(gradient["pos_embed"].sum(), 4 * 16, rtol=1e-5)


def config_of(**overrides):
    config = digits.get_config()
    config.objective, config.batch_size, config.steps = "dino", 32, 12
    model, augment, dino = config.model, config.augment, config.dino
    model.width, model.depth, model.class_depth, model.num_heads = 16, 1, 1, 2
    for key in ("rotate", "zoom", "shear", "translate", "reprob", "mixup", "cutmix"):
        augment[key] = 0.0
    augment.pad_crop, augment.rand_augment = 0, ""
    dino.local_crops, dino.local_size, dino.blur = 2, 4, False
    dino.head_hidden, dino.bottleneck, dino.out_dim = 32, 16, 24
    dino.freeze_last_epochs, dino.teacher_temp_epochs = 0.05, 0.1
    config.optimizer.ema_decay, config.optimizer.final_weight_decay = 0.0, 0.4
    config.eval.every_epochs = 6 * 32 / 1437
    config.checkpoint.every_steps = 5
    for key, value in overrides.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


@pytest.mark.slow
def test_losses_are_the_same_where_parameters_are_sharded():
    def losses_of(**sizes):
        config = config_of()
        config.model.precision = "highest"
        for axis, size in sizes.items():
            config.mesh[axis] = size
        trainer = build(config)
        state, batches = trainer.init_state(), trainer.train_batches()
        found = []
        for _ in range(3):
            batch = put_batch(next(batches), batch_sharding(trainer.mesh))
            state, metrics = trainer.train_step(state, batch)
            found.append(float(metrics["loss"]))
        kernel = state.carried["teacher"]["head"]["last"]["kernel"]
        return found, len({str(shard.index) for shard in kernel.addressable_shards})

    plain, whole = losses_of()
    sharded, parts = losses_of(data=2, fsdp=2, tensor=2)
    assert (whole, parts) == (1, 4)
    np.testing.assert_allclose(sharded, plain, rtol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its workdir."""
    workdir = tmp_path_factory.mktemp("dino") / "whole"
    return train(config_of(), workdir), workdir


@pytest.mark.slow
def test_a_run_stops_and_resumes_to_the_same_bits(finished, tmp_path, monkeypatch):
    whole, _ = finished

    from cait_jax.train import loop

    stop = contextlib.nullcontext(lambda step: step == 8)
    monkeypatch.setattr(loop, "stop_signal", lambda: stop)
    assert not train(config_of(), tmp_path / "parts").finished
    monkeypatch.undo()
    resumed = train(config_of(), tmp_path / "parts")
    assert_same_bits(resumed.state, whole.state)
    assert resumed.metrics == pytest.approx(whole.metrics, abs=0)


@pytest.mark.slow
def test_a_run_is_evaluated_by_the_neighbours_of_its_teachers_features(finished):
    run, _ = finished
    assert set(run.metrics) == {
        "eval/knn_accuracy",
        "eval/feature_rank",
        "eval/feature_std",
        "eval/teacher_entropy",
        "eval/mean_entropy",
    }
    trainer = build(config_of())
    teacher = jax.tree.map(jnp.asarray, jax.device_get(run.state.carried["teacher"]["backbone"]))

    def features(split):
        mean, std = np.float32(trainer.config.data.mean), np.float32(trainer.config.data.std)
        images = jnp.asarray((np.float32(split.images) / 255 - mean) / std)
        return np.float64(trainer.model.apply({"params": teacher}, images))

    def weights(far):
        return np.exp((far.min(1, keepdims=True) - far) / 0.07)

    neighbours = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights)
    neighbours.fit(features(trainer.train_split), trainer.train_split.labels)
    found = features(trainer.eval_split)
    expected = neighbours.score(found, trainer.eval_split.labels)
    # The features differ little after 12 steps, so that a few neighbours are as near as others in float32.
    assert run.metrics["eval/knn_accuracy"] == pytest.approx(expected, abs=2 / 360)
    assert expected > 0.3

    x = found / np.linalg.norm(found, axis=1, keepdims=True)
    spread = np.sqrt(np.square(x - x.mean(0)).sum(1).mean())
    assert run.metrics["eval/feature_std"] == pytest.approx(spread, rel=1e-3)
    shares = np.linalg.svd(x, compute_uv=False)
    shares /= shares.sum()
    rank = np.exp(-(shares * np.log(shares)).sum())
    assert run.metrics["eval/feature_rank"] == pytest.approx(rank, rel=1e-3)


@pytest.mark.slow
def test_a_classifier_starts_from_the_teachers_backbone(finished, tmp_path, caplog):
    run, workdir = finished
    teacher = jax.device_get(run.state.carried["teacher"]["backbone"])
    model, variables = load_pretrained(workdir)
    assert model.num_classes == 0
    assert_same_bits(variables["params"], teacher)

    config = digits.get_config()
    for key in ("width", "depth", "class_depth", "num_heads"):
        config.model[key] = config_of().model[key]
    config.init.weights = str(workdir)
    params = jax.device_get(build(config).init_state().params)
    head = params.pop("head")
    assert_same_bits(params, teacher)
    assert head["kernel"].shape == (16, 10)
    assert (
        f"{workdir} was trained without labels: its teacher's backbone is taken, its projection head is dropped, "
        "and the head starts anew" in caplog.text
    )
    config.init.ema = True
    with pytest.raises(UserError, match="which is an average already: leave out"):
        build(config).init_state()
    config.init.ema, config.model.width = False, 32
    with pytest.raises(UserError, match="are not for this model"):
        build(config).init_state()

    further = config_of()  # and so does another run without labels
    further.init.weights = str(workdir)
    state = build(further).init_state()
    assert_same_bits(jax.device_get(state.params["backbone"]), teacher)
    assert_same_bits(jax.device_get(state.carried["teacher"]), jax.device_get(state.params))


@pytest.mark.slow
def test_the_commands_measure_and_write_the_features_of_a_run(finished, tmp_path):
    run, workdir = finished
    check_feature_commands(run, workdir, tmp_path)


def test_nothing_finite_is_said_of_features_that_are_not():
    trainer = build(config_of())
    state = trainer.init_state()
    evaluated = trainer.objective.evaluated({"": state.params}, state.carried)[""]
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, evaluated)
    with trainer.eval_batches() as batches:
        found = trainer.evaluate({"": nan}, batches)[""]
    entropies = {"teacher_entropy", "mean_entropy"}
    assert set(found) == {"knn_accuracy", "feature_rank", "feature_std"} | entropies
    assert all(map(math.isnan, found.values()))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"augment__mixup": 0.8}, r"augment\.mixup=0\.8 has no place in .*=dino: set it to 0"),
        ({"augment__rand_augment": "rand-m9-inc1"}, "rand_augment=.*: set it to nothing"),
        ({"optimizer__ema_decay": 0.9}, r"optimizer\.ema_decay=0\.9 has no place"),
        ({"optimizer__layer_decay": 0.9}, r"optimizer\.layer_decay=0\.9 has no place"),
        ({"report__inspect_every": 1}, r"report\.inspect_every=1 has no place"),
        ({"optimizer__name": "lamb"}, "choose adamw, lion, muon or sgd"),
        ({"dino__local_size": 6}, "local_size=6 cannot be cut in patches of 4 by 4"),
        ({"dino__koleo": 0.1, "optimizer__grad_accum": 2}, "koleo compares the images of a whole"),
        ({"dino__out_dim": 1}, "out_dim is 1 and must be a whole number of 2 or more"),
        ({"model__name": "regnety_160"}, "has batch norms"),
    ],
)
def test_what_has_no_place_is_refused_in_a_sentence(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        build(config_of(**overrides))
