"""A network's description is the whole network, also one from before an attribute existed."""

import json

import numpy as np
import pytest

from cait_jax import UserError, create_model
from cait_jax.weights.model_json import model_from_dict, model_to_dict
from cait_jax.weights.pretrained import load_pretrained, save_pretrained


def test_other_networks_and_attributes_are_described_whole():
    for made in (
        create_model("vit_6x256", depth=1, image_size=(32, 64), class_token=0),
        create_model("cait_xxs24", depth=1, residual="rezero", talking_heads=False),
        create_model("regnety_160"),
    ):
        assert model_from_dict(json.loads(json.dumps(model_to_dict(made)))) == made


def test_a_description_of_before_an_attribute_existed_gives_its_default():
    model = create_model("cait_xxs24", depth=1, dropout=0.1)
    old = json.loads(json.dumps(model_to_dict(model)))
    del old["attributes"]["projection_dropout"]
    assert model_from_dict(old) == model


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"dtype": "flot32"}, r"no dtype 'flot32'; nearest: float32"),
        ({"param_dtype": np.int32}, r"no param_dtype 'int32'"),
        ({"widht": 32}, r"no attribute 'widht'; nearest: width"),
        ({"image_size": 9}, r"image_size 9x9 cannot be cut in patches of 4x4"),
    ],
)
def test_attributes_that_cannot_be_changed(tmp_path, model, variables, attributes, sentence):
    save_pretrained(tmp_path, model, variables)
    with pytest.raises(UserError, match=sentence):
        load_pretrained(tmp_path, **attributes)


def test_a_network_of_the_callers_own_cannot_be_described(model):
    class Other(type(model)):
        pass

    with pytest.raises(UserError, match=r"a Other cannot be saved; it can be one of CaiT, RegNetY"):
        model_to_dict(Other(image_size=(16, 16), width=16, depth=1, num_heads=2))
    with pytest.raises(UserError, match=r"precision=.* cannot be saved"):
        model_to_dict(model.clone(precision=(("bfloat16",),)))
