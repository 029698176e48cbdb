"""The table of released weights, and what is said about a name that is not in it."""

import pytest

from cait_jax import UserError, create_model
from cait_jax.weights.released import RELEASED, find_released


def test_every_row_is_a_model_at_its_own_resolution():
    assert len(RELEASED) == 19
    for name, row in RELEASED.items():
        assert (row.name, create_model(name).image_size) == (name, (row.image_size,) * 2)
        assert row.hub_id.startswith(f"timm/{name}.")
        assert bool(row.source) == (row.top1 is not None)
        assert row.preprocessing()["image_size"] == [row.image_size] * 2


def test_evaluation_settings_by_family():
    assert {row.crop_ratio for name, row in RELEASED.items() if name.startswith("cait")} == {1.0}
    assert {row.crop_ratio for name, row in RELEASED.items() if name.startswith("deit")} == {0.9}
    assert find_released("regnety_160").crop_ratio == 0.95
    assert find_released("vit_base_patch16_224").mean == (0.5, 0.5, 0.5)
    assert find_released("cait_m48_448").std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cait_xs24", r"no weights were released as cait_xs24; .* was as cait_xs24_384, which can"),
        ("cait_s24", r"as cait_s24_224 and cait_s24_384"),
        ("cait_s48", r"no weights were released for cait_s48: give weights=PATH, or choose"),
        ("vit_tiny", r"no weights were released for vit_tiny"),
        ("deit_tiny", r"was as deit_tiny_patch16_224, "),
        ("cait_xxs24_225", r"no model 'cait_xxs24_225'; nearest: cait_xxs24_224"),
    ],
)
def test_a_name_without_weights(name, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        find_released(name)
    assert "\n" not in str(caught.value)
