"""Golden parameter counts, that every named model has one, and that every network traces for any batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from trees import random_params

from cait_jax import create_model, list_models
from cait_jax.models.regnet import stage_sizes
from cait_jax.models.vit import VisionTransformer

# The released models' and the paper's counts, as published (1000 classes).
PUBLISHED = {
    "cait_xxs24": 11_956_264,
    "cait_xxs24_224": 11_956_264,
    "cait_xxs24_384": 12_029_224,
    "cait_xxs36": 17_299_720,
    "cait_xxs36_224": 17_299_720,
    "cait_xxs36_384": 17_372_680,
    "cait_xs24": 26_560_648,
    "cait_xs24_384": 26_670_088,
    "cait_xs36": 38_557_432,
    "cait_s24": 46_916_200,
    "cait_s24_224": 46_916_200,
    "cait_s24_384": 47_062_120,
    "cait_s36": 68_220_712,
    "cait_s36_384": 68_366_632,
    "cait_s48": 89_525_224,
    "cait_m24": 185_850_088,
    "cait_m36": 270_929_512,
    "cait_m36_384": 271_221_352,
    "cait_m48": 356_008_936,
    "cait_m48_448": 356_460_520,
}
# Ours, by hand: see count_by_hand. Of the tables below, what timm 1.0.31 counts.
SMALL = {"cait_xxs12_patch4_32": 6_449_224, "cait_nano4_patch4_8": 367_368}
VIT = {
    "vit_6x256": 5_243_624,
    "vit_8x384": 14_952_808,
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
    "vit_base_patch16_224": 86_567_656,
    "vit_large": 304_326_632,
    "vit_large_patch16_224": 304_326_632,
    "vit_huge": 632_199_400,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_384": 86_859_496,
    "vit_small_patch16_224.dino": 21_665_664,
    "vit_small_patch8_224.dino": 21_670_272,
    "vit_base_patch16_224.dino": 85_798_656,
    "vit_base_patch8_224.dino": 85_807_872,
    "vit_base_patch16_224.mae": 85_798_656,
    "vit_large_patch16_224.mae": 303_301_632,
    "vit_small_patch14_dinov2.lvd142m": 22_056_192,
    "vit_small_patch14_reg4_dinov2.lvd142m": 22_057_344,
    "vit_base_patch14_dinov2.lvd142m": 86_579_712,
    "vit_base_patch14_reg4_dinov2.lvd142m": 86_582_016,
    "vit_large_patch14_dinov2.lvd142m": 304_367_616,
    "vit_large_patch14_reg4_dinov2.lvd142m": 304_370_688,
    "vit_giant_patch14_dinov2.lvd142m": 1_136_479_232,
    "vit_giant_patch14_reg4_dinov2.lvd142m": 1_136_483_840,
}
DEIT3 = {
    "deit3_small": 22_059_496,
    "deit3_medium": 38_849_512,
    "deit3_base": 86_585_320,
    "deit3_large": 304_374_760,
}
DEIT3 |= {f"{name}_patch16_224": parameters for name, parameters in DEIT3.items()} | {
    "deit3_small_patch16_384": 22_205_416,
    "deit3_base_patch16_384": 86_877_160,
    "deit3_large_patch16_384": 304_763_880,
}
DEIT3 |= {f"{n}.fb_in22k_ft_in1k": count for n, count in DEIT3.items() if "patch16" in n}
DEIT = {
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "deit_tiny_distilled": 5_910_800,
    "deit_small_distilled": 22_436_432,
    "deit_base_distilled": 87_338_192,
}
DEIT |= {f"{name}_patch16_224": parameters for name, parameters in DEIT.items()}
REGNET = {"regnety_160": 83_590_140}
GOLDEN = PUBLISHED | SMALL | VIT | DEIT | DEIT3 | REGNET

# name: drop path, LayerScale start value (released code).
RECIPE = {
    "cait_xxs24": (0.05, 1e-5),
    "cait_xxs36": (0.1, 1e-5),
    "cait_xs24": (0.05, 1e-5),
    "cait_xs36": (0.1, 1e-6),
    "cait_s24": (0.1, 1e-5),
    "cait_s36": (0.2, 1e-6),
    "cait_s48": (0.3, 1e-6),
    "cait_m24": (0.2, 1e-5),
    "cait_m36": (0.3, 1e-6),
    "cait_m48": (0.4, 1e-6),
}


def count(model):
    images = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def count_by_hand(model, classes=1000):
    d, heads, patch = model.width, model.num_heads, model.patch_size
    tokens = (model.image_size[0] // patch) * (model.image_size[1] // patch)

    def linear(n_in, n_out):
        return n_in * n_out + n_out

    shared = 2 * 2 * d + 2 * d + linear(d, 4 * d) + linear(4 * d, d)  # norms, gammas, MLP
    block = shared + linear(d, 3 * d) + linear(d, d) + 2 * linear(heads, heads)
    class_block = shared + 4 * linear(d, d)
    embedding = linear(patch**2 * model.in_channels, d) + tokens * d + d
    return embedding + model.depth * block + 2 * class_block + 2 * d + linear(d, classes)


def test_every_named_model_has_a_golden_count():
    assert set(list_models()) == set(GOLDEN)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_parameter_count(name):
    model = create_model(name)
    assert count(model) == GOLDEN[name]
    if name in PUBLISHED | SMALL:
        assert count_by_hand(model) == GOLDEN[name]


@pytest.mark.parametrize("name", sorted(RECIPE))
def test_drop_path_and_layer_scale_are_the_released_ones(name):
    model = create_model(name)
    assert (model.drop_path_rate, model.layer_scale_init) == RECIPE[name]
    assert model.width // model.num_heads == 48
    assert model.patch_size == 16


def test_regnety_16gf_has_the_widths_and_depths_of_its_paper():
    """Radosavovic et al., arXiv 2003.13678, the figures beside RegNetY-16GF."""
    assert stage_sizes(200, 106.23, 2.48, 18, 112) == ((224, 2), (448, 4), (1232, 11), (3024, 1))


def test_distilled_names_go_with_published_ones():
    """The published names put the patch size after the word distilled."""
    assert create_model("deit_tiny_distilled_patch16_224").distilled
    assert not create_model("deit_tiny_patch16_224").distilled
    assert isinstance(create_model("vit_base"), VisionTransformer)


def test_released_names_carry_their_resolution():
    assert create_model("cait_m48_448").image_size == (448, 448)
    assert create_model("cait_m48_448", image_size=(224, 320)).image_size == (224, 320)


# 16 patches in 2 heads are attended to in one step on a CPU; 64 in 4 heads one image at a time.
CAIT = {"image_size": 8, "patch_size": 2, "width": 16, "num_heads": 2, "depth": 2}
REGNETY = {
    "image_size": 32,
    "w0": 8,
    "wa": 4.0,
    "wm": 2.0,
    "depth": 2,
    "group_width": 8,
    "stem_width": 8,
}


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        slow("cait_nano4_patch4_8", CAIT),
        slow("cait_nano4_patch4_8", CAIT | {"patch_size": 1, "num_heads": 4}),
        slow("cait_nano4_patch4_8", CAIT | {"stacked": False}),
        slow("cait_nano4_patch4_8", CAIT | {"class_token": 1}),
        slow("vit_6x256", CAIT),
        ("deit_tiny_distilled", CAIT),
        slow("regnety_160", REGNETY),
    ],
)
def test_one_exported_program_takes_every_batch_size(name, attributes):
    model = create_model(name, num_classes=3, **attributes)
    shape = (*model.image_size, model.in_channels)
    images = jax.random.normal(jax.random.key(1), (5, *shape))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    statistics = {k: jax.tree.map(lambda a: jnp.ones(a.shape), v) for k, v in variables.items()}
    variables = statistics | {"params": random_params(model)}

    (batch,) = jax.export.symbolic_shape("batch")
    symbolic = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    exported = jax.export.export(jax.jit(model.apply))(variables, symbolic)
    assert str(exported.out_avals[0].shape) == "(batch, 3)"
    for size in (2, 5):
        logits = exported.call(variables, images[:size])
        expected = model.apply(variables, images[:size])
        scale = float(jnp.abs(expected).max())
        assert scale > 0.1
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
