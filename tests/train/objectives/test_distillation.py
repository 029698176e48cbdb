"""Teachers beside the student, recorded logits, and the two heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from cait_jax import UserError, create_model
from cait_jax.augment.pipeline import normalise
from cait_jax.train.objectives.distillation import both_heads, make_teacher, read_logits

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
STUDENT = {"student_mean": (0.5,), "student_std": (0.25, 0.5, 0.2)}
TINY = {"image_size": 8, "patch_size": 4, "width": 8, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def teacher_model():
    return create_model("vit_6x256", depth=1, **TINY)


@pytest.fixture(scope="module")
def variables(teacher_model):
    return {"params": random_params(teacher_model)}


def pixels(size):
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def as_the_student_sees(images):
    return normalise(jnp.asarray(images), STUDENT["student_mean"], STUDENT["student_std"])


def test_the_teacher_sees_its_own_normalisation(teacher_model, variables):
    teacher = make_teacher(teacher_model, variables, **IMAGENET, **STUDENT, dtype="float32")
    direct = teacher_model.apply(variables, normalise(jnp.asarray(pixels(8)), *IMAGENET.values()))
    np.testing.assert_allclose(teacher(as_the_student_sees(pixels(8))), direct, atol=1e-5)


def test_it_computes_in_bfloat16_and_its_variables_are_an_argument(teacher_model, variables):
    exact = make_teacher(teacher_model, variables, **IMAGENET, **STUDENT, dtype="float32")
    teacher = make_teacher(teacher_model, variables, **IMAGENET, **STUDENT)
    images = as_the_student_sees(pixels(8))

    def apply(teacher, images):
        return teacher(images)

    program = jax.make_jaxpr(apply)(teacher, images)
    assert all(const.size <= 3 for const in program.consts)  # means and deviations
    assert "bf16" in str(program)
    logits = jax.jit(apply)(teacher, images)
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - exact(images)).max()
    assert 0 < difference < 0.05 * np.abs(exact(images)).max()


def test_nothing_is_learnt_through_the_teacher(teacher_model, variables):
    teacher = make_teacher(teacher_model, variables, **IMAGENET, **STUDENT, dtype="float32")
    images = as_the_student_sees(pixels(8))
    of_images, of_teacher = jax.grad(lambda images, teacher: teacher(images).sum(), argnums=(0, 1))(
        images, teacher
    )
    assert not of_images.any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_teacher))


@pytest.mark.parametrize("size", [8, 24])
def test_a_regnet_sees_the_students_own_images(size):
    """Also in a run at 384 or 448 pixels with a teacher of 224."""
    model = create_model(
        "regnety_160", image_size=16, w0=8, wa=8.0, wm=2.0, depth=1, group_width=8, num_classes=3
    )
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 1, leaf.shape)), template)
    same = {"student_mean": IMAGENET["mean"], "student_std": IMAGENET["std"]}
    teacher = make_teacher(model, variables, **IMAGENET, **same, dtype="float32")
    images = normalise(jnp.asarray(pixels(size)), *IMAGENET.values())
    found, expected = teacher(images), model.apply(variables, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    resized = jax.image.resize(images, (2, 16, 16, 3), "cubic", antialias=True)
    assert np.abs(model.apply(variables, resized) - expected).max() > 1e-2


def test_a_transformer_sees_images_of_its_own_size(teacher_model, variables):
    same = {"student_mean": IMAGENET["mean"], "student_std": IMAGENET["std"]}
    teacher = make_teacher(teacher_model, variables, **IMAGENET, **same, dtype="float32")
    images = normalise(jnp.asarray(pixels(16)), *IMAGENET.values())
    resized = jax.image.resize(images, (2, 8, 8, 3), "cubic", antialias=True)
    expected = teacher_model.apply(variables, resized)
    np.testing.assert_allclose(teacher(images), expected, rtol=1e-5, atol=1e-6)


def test_teachers_that_do_not_fit(teacher_model, variables):
    def refused(match, model=teacher_model, **others):
        options = {**IMAGENET, **STUDENT, **others}
        with pytest.raises(UserError, match=match):
            make_teacher(model, variables, **options)

    refused("no head", model=teacher_model.clone(num_classes=0))
    refused("knows 3 classes and the student 10", num_classes=10)
    refused("student_mean has 2 values", student_mean=(0.5, 0.5))
    refused("std is", std=(0.2, 0.0, 0.2))


def test_both_heads_of_one_apply():
    model = create_model("deit_tiny_distilled", depth=2, drop_path_rate=0.5, **TINY)
    variables = {"params": random_params(model)}
    images = as_the_student_sees(pixels(8))
    options = {"train": True, "rngs": {"drop_path": jax.random.key(0)}}

    @jax.jit
    def apply(variables, images):
        return both_heads(model, variables, images, **options), model.apply(
            variables, images, **options
        )

    (of_class, of_teacher), mean = apply(variables, images)
    np.testing.assert_allclose((of_class + of_teacher) / 2, mean, rtol=1e-6)
    assert np.abs(of_class - of_teacher).min() > 1e-3


def test_one_head_is_not_two(teacher_model, variables):
    with pytest.raises(UserError, match="deit_small_distilled"):
        both_heads(teacher_model, variables, jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_recorded_logits_come_back(tmp_path, dtype, write):
    logits = np.random.default_rng(0).standard_normal((5, 3)).astype(dtype)
    write(tmp_path / "teacher.npz", logits=logits)
    found = read_logits(tmp_path / "teacher.npz", 5, 3)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"labels": np.zeros(5)}, "holds labels and no logits"),
        ({}, "holds nothing"),
        ({"logits": np.zeros((5, 3), np.float64)}, "are float64"),
        ({"logits": np.zeros((4, 3), np.float32)}, r"shape \(4, 3\) and the split needs \(5, 3\)"),
        ({"logits": np.zeros((3, 5), np.float32)}, r"shape \(3, 5\)"),
        ({"logits": np.array([["a"]], object)}, "cannot be read as logits"),
        ({"logits": np.float16([[0] * 3] * 3 + [[0, np.inf, 0]] * 2)}, "of example 3 .*not finite"),
    ],
)
def test_recorded_logits_that_do_not_fit(tmp_path, stored, said):
    np.savez(tmp_path / "teacher.npz", **stored)
    with pytest.raises(UserError, match=said):
        read_logits(tmp_path / "teacher.npz", 5, 3)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "flipped", "npy"])
def test_files_that_hold_no_logits(tmp_path, damage):
    path = tmp_path / "teacher.npz"
    np.savez(path, logits=np.ones((5, 3), np.float32))
    data = bytearray(path.read_bytes())
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("logits")
        case "cut":
            path.write_bytes(data[:150])
        case "flipped":
            place = data.index(np.float32(1).tobytes() * 4)
            data[place] ^= 1
            path.write_bytes(data)
        case "npy":
            with path.open("wb") as file:
                np.save(file, np.ones((5, 3), np.float32))
    with pytest.raises(UserError, match=r"numpy\.savez"):
        read_logits(path, 5, 3)
