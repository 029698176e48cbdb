import pytest
from tfds_files import encode, noise, write, write_cifar10

from cait_jax import UserError
from cait_jax.evaluation import Benchmark, find_benchmark


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet", Benchmark("imagenet2012", "validation", "all")),
        ("imagenet2012:5.1.0", Benchmark("imagenet2012:5.1.0", "validation", "all")),
        ("imagenet_v2", Benchmark("imagenet_v2/matched-frequency", "test", "all")),
        ("imagenet_v2/topimages", Benchmark("imagenet_v2/topimages", "test", "all")),
        ("imagenet_real", Benchmark("imagenet2012_real", "validation", "real")),
        ("imagenet_real:1.0.0", Benchmark("imagenet2012_real:1.0.0", "validation", "real")),
        ("imagenet2012_real", Benchmark("imagenet2012_real", "validation", "real")),
        ("imagenet_a", Benchmark("imagenet_a", "test", "restricted")),
        ("imagenet_r", Benchmark("imagenet_r", "test", "restricted")),
        ("imagenet_sketch", Benchmark("imagenet_sketch", "test", "all")),
        ("digits", Benchmark("digits", "test")),
    ],
)
def test_names(name, expected):
    assert find_benchmark(name) == expected


def test_the_benchmarks_are_data_sets_of_tfds():
    import tensorflow_datasets as tfds

    for name in ("imagenet_v2", "imagenet_real", "imagenet_a", "imagenet_r", "imagenet_sketch"):
        benchmark = find_benchmark(name)
        builder = tfds.builder(benchmark.data)
        assert builder.name == benchmark.data.split("/")[0]
        features = set(builder.info.features)
        assert {"image", "original_label" if benchmark.rule == "real" else "label"} < features


def test_another_split_of_a_benchmark_keeps_its_rule():
    assert find_benchmark("imagenet_a", "test[:9]") == Benchmark(
        "imagenet_a", "test[:9]", "restricted"
    )
    assert find_benchmark("cifar10", "train") == Benchmark("cifar10", "train")


def test_the_default_split_of_other_data(tmp_path):
    examples = [(encode(noise(0, 32, 32)), 0)]
    write_cifar10(tmp_path, {"train": examples, "validation": examples, "test": examples})
    assert find_benchmark("cifar10", data_dir=str(tmp_path)) == Benchmark("cifar10", "test")
    folder = tmp_path / "mnist" / "3.0.1"
    write(folder, "mnist", {"fit": examples, "train": examples}, ("0",), image_shape=(32, 32, 3))
    with pytest.raises(UserError, match=r"mnist has none of .* its own, which are fit, train"):
        find_benchmark("mnist", data_dir=str(tmp_path))


def test_the_default_split_of_a_folder(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "divided" / split / "cat").mkdir(parents=True)
    (tmp_path / "whole" / "cat").mkdir(parents=True)
    assert find_benchmark(str(tmp_path / "divided")).split == "val"
    assert find_benchmark(str(tmp_path / "whole")).split == "all"
