"""The table of released weights, and what is said about a name that is not in it."""

import pytest

from cait_jax import UserError, create_model
from cait_jax.weights.released import RELEASED, find_released
from cait_jax.weights.results import Result, published_result


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
    assert find_released("regnety_160").crop_ratio == 0.875
    assert find_released("vit_base_patch16_224").mean == (0.5, 0.5, 0.5)
    assert find_released("cait_m48_448").std == (0.229, 0.224, 0.225)


# results/results-imagenet.csv of huggingface/pytorch-image-models at commit 0173a139: top1, img_size, crop_pct.
CSV = {
    "deit_tiny_patch16_224": (72.172, 224, 0.9),
    "deit_small_patch16_224": (79.844, 224, 0.9),
    "deit_base_patch16_224": (81.992, 224, 0.9),
    "deit_tiny_distilled_patch16_224": (74.500, 224, 0.9),
    "deit_small_distilled_patch16_224": (81.218, 224, 0.9),
    "deit_base_distilled_patch16_224": (83.386, 224, 0.9),
    "vit_base_patch16_224": (84.532, 224, 0.9),
    "vit_large_patch16_224": (85.834, 224, 0.9),
}


def test_accuracy_and_crop_are_of_one_source():
    for name, expected in CSV.items():
        row = RELEASED[name]
        assert (row.top1, row.image_size, row.crop_ratio) == expected
        assert row.source == "timm's measurement"
    # Not in that table at 224 pixels: the paper's figure with the crop of its code, 224 of 256 pixels.
    teacher = RELEASED["regnety_160"]
    assert (teacher.top1, teacher.crop_ratio) == (82.9, 0.875)
    assert teacher.source == "DeiT paper, arXiv 2012.12877"


def test_an_architecture_has_its_papers_figure_and_no_released_one():
    assert published_result("deit_base") == Result(81.8, "DeiT paper, arXiv 2012.12877")
    assert published_result("deit_base_patch16_224") == Result(81.992, "timm's measurement")
    assert published_result("cait_s24").top1 == 82.7
    assert published_result("cait_s24_224").top1 == 83.484
    for name in ("vit_base", "vit_huge", "cait_m48", "cait_nano4_patch4_8"):
        assert published_result(name) is None


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
