"""A network as an NNX module: the same parameters, state, logits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from trees import assert_same_bits, random_params

from cait_jax import create_model, to_nnx

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))


def cait(**attributes):
    model = create_model("cait_nano4_patch4_8", num_classes=3, **attributes)
    return model, {"params": random_params(model)}


def test_parameters_logits_and_gradients_are_equal():
    model, variables = cait()
    module = to_nnx(model, variables)
    assert_same_bits(nnx.to_pure_dict(nnx.state(module, nnx.Param)), variables["params"])
    np.testing.assert_array_equal(module(IMAGES), model.apply(variables, IMAGES))

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.array([0, 1, 2, 0])
        ).mean()

    found = nnx.jit(nnx.grad(lambda module: loss(module(IMAGES))))(module)
    expected = jax.jit(jax.grad(lambda params: loss(model.apply({"params": params}, IMAGES))))
    assert_same_bits(nnx.to_pure_dict(found), expected(variables["params"]))


def test_the_streams_of_rngs_drop_paths():
    model, variables = cait(drop_path_rate=0.5)
    module = to_nnx(model, variables, rngs=nnx.Rngs(drop_path=1))
    first, second = (np.asarray(module(IMAGES, train=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3  # a stream goes on
    given = module(IMAGES, train=True, rngs=nnx.Rngs(drop_path=1))
    key = nnx.Rngs(drop_path=1).drop_path()
    expected = model.apply(variables, IMAGES, train=True, rngs={"drop_path": key})
    np.testing.assert_array_equal(given, expected)


def test_batch_statistics_are_state_that_training_changes():
    sizes = {"w0": 8, "wa": 4.0, "wm": 2.0, "depth": 2, "group_width": 8, "stem_width": 8}
    model = create_model("regnety_160", num_classes=3, image_size=32, **sizes)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = model.init(jax.random.key(2), images)
    module = to_nnx(model, variables)
    logits = module(images, train=True, mutable=["batch_stats"])
    expected, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(logits, expected)
    assert_same_bits(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)), changed["batch_stats"])
    np.testing.assert_array_equal(
        module(images), model.apply({"params": variables["params"], **changed}, images)
    )
