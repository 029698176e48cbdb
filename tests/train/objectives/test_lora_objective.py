"""Adapters and head trained by the one loop, around a base that stays."""

import contextlib

import jax
import numpy as np
import pytest
from small_runs import small_digits
from trees import assert_same_bits, random_params

from cait_jax import UserError, create_model, load_pretrained, save_pretrained
from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train import loop, train
from cait_jax.train.setup import build

SETTINGS = {"image_size": [8, 8], "crop_pct": 1.0, "mean": [0.5], "std": [0.5], "channels": 1}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A saved model of the digits' size, with weights that are far from their start."""
    config = small_digits()
    attributes = {name: value for name, value in config.model.items() if name != "name"}
    model = create_model(
        config.model.name, image_size=8, in_channels=1, num_classes=10, **attributes
    )
    directory = tmp_path_factory.mktemp("start") / "model"
    params = random_params(model)
    save_pretrained(directory, model, {"params": params}, preprocessing=SETTINGS)
    return directory, params


def adapting(start, **model):
    config = small_digits()
    config.init.weights, config.lora.rank = str(start[0]), 2
    config.steps = 8
    config.optimizer.warmup_epochs, config.optimizer.learning_rate = 0.0, 3e-2
    config.optimizer.ema_decay = 0.5
    config.model.update(model)
    return config


def test_a_run_learns_adapters_and_is_read_merged(start, tmp_path, monkeypatch):
    _, params = start
    run = train(adapting(start), tmp_path / "whole")
    learnt = {
        jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        for path, _ in jax.tree_util.tree_leaves_with_path(run.state.params)
    }
    assert learnt == {"lora_a", "lora_b", "kernel", "bias"}  # the last two are the head's
    size = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim)
    assert moments == 2 * size
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size < whole / 2

    base = {name: layer for name, layer in params.items() if name != "head"}
    assert_same_bits(jax.device_get(run.state.carried["base"]), jax.device_get(base))

    # Plain parameters for everybody else: they give the accuracy that the run logged.
    for ema, prefix in ((False, ""), (True, "ema_")):
        model, variables = load_pretrained(tmp_path / "whole", ema=ema)
        assert jax.tree.structure(variables["params"]) == jax.tree.structure(params)
        changed = variables["params"]["blocks"]["attn"]["qkv"]["kernel"]
        assert np.abs(changed - params["blocks"]["attn"]["qkv"]["kernel"]).max() > 1e-2
        trainer = build(adapting(start))
        with trainer.eval_batches() as batches:
            found = trainer.evaluate({"": variables["params"]}, batches)[""]
        assert found["accuracy"] == run.metrics[f"eval/{prefix}accuracy"]
        assert found["loss"] == pytest.approx(run.metrics[f"eval/{prefix}loss"], rel=1e-5)
    save_pretrained(tmp_path / "merged", model, variables, preprocessing=SETTINGS)
    assert_same_bits(load_pretrained(tmp_path / "merged")[1], variables)

    # Stopped and resumed, with the same bits.
    stop = contextlib.nullcontext(lambda step: step == 5)
    monkeypatch.setattr(loop, "stop_signal", lambda: stop)
    assert not train(adapting(start), tmp_path / "parts").finished
    monkeypatch.undo()
    resumed = train(adapting(start), tmp_path / "parts")
    assert_same_bits(jax.device_get(resumed.state), jax.device_get(run.state))
    assert resumed.metrics == run.metrics


def losses(config, devices, steps=3):
    trainer = build(config, devices)
    state, found = trainer.init_state(), []
    with trainer.train_batches() as batches:
        for _ in range(steps):
            batch = put_batch(next(batches), batch_sharding(trainer.mesh))
            state, metrics = trainer.train_step(state, batch)
            found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 1, 1), (2, 2, 2)])
def test_a_mesh_gives_the_same_losses(start, mesh):
    config = adapting(start, precision="highest", dropout=0.1, drop_path_rate=0.2)
    config.optimizer.grad_accum = 2
    expected = losses(config, jax.devices()[:1])
    assert expected[-1] < expected[0]
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    found = losses(config, jax.devices()[: int(np.prod(mesh))])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("part", ["head", "1"])
def test_a_part_of_the_adapters_may_be_trained(start, part):
    config = adapting(start)
    config.optimizer.train = part
    trainer = build(config)
    state = trainer.init_state()
    before = jax.device_get(state.params)
    with trainer.train_batches() as batches:
        for _ in range(2):  # A moves when B has
            batch = put_batch(next(batches), batch_sharding(trainer.mesh))
            state, _ = trainer.train_step(state, batch)
    after = jax.device_get(state.params)
    moved = {name for name in before if not _same(before[name], after[name])}
    assert moved == {"head"} | ({"blocks_token_only_0"} if part == "1" else set())


def _same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"lora.rank": 17}, r"lora\.rank=17 is above the network's width, 16.*such as 8"),
        ({"init.weights": None}, r"adapts weights that are learnt: give --config\.init\.weights"),
        ({"optimizer.name": "muon"}, "choose another optimizer"),
        ({"report.inspect_every": 5}, "set one of them to 0"),
        ({"objective": "dino"}, r"lora\.rank is for --config\.objective=supervised"),
        ({"lora.rank": 0, "lora.alpha": 4.0}, r"lora\.alpha is for adapters: set"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(start, overrides, sentence):
    config = adapting(start)
    config.update_from_flattened_dict(overrides)
    with pytest.raises(UserError, match=sentence) as caught:
        build(config)
    assert "\n" not in str(caught.value)
