"""Writes small TFDS data sets, and images for them, without TensorFlow."""

import io
import json
import struct
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from cait_jax.data.prepare import masked_crc

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FEATURES = "tensorflow_datasets.core.features."

Example = tuple[bytes, int]


def encode(
    pixels: np.ndarray, image_format: str = "PNG", mode: str | None = None, **options
) -> bytes:
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, image_format, **options)
    return file.getvalue()


def noise(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def numbered_jpeg(number: int, height: int, width: int) -> bytes:
    """A picture of smooth noise; each number gives another."""
    small = Image.fromarray(noise(number, 6, 8))
    return encode(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)), "JPEG")


def write_cifar10(data_dir: Path, splits: dict[str, list[Example]], **options) -> Path:
    return write(
        data_dir / "cifar10" / "3.0.2",
        "cifar10",
        splits,
        CIFAR10,
        image_shape=(32, 32, 3),
        **options,
    )


def write_imagenet2012(data_dir: Path, splits: dict[str, list[Example]], **options) -> Path:
    names = tuple(f"n{number:08d}" for number in range(1000))
    folder = data_dir / "imagenet2012" / "5.1.0"
    return write(folder, "imagenet2012", splits, names, image_shape=(-1, -1, 3), **options)


def write_imagenet_real(
    data_dir: Path, examples: list[tuple[bytes, int, list[int]]], num_classes: int = 1000
) -> Path:
    """ImageNet's validation split with ReaL labels: (image, original label, any number of labels)."""
    names = tuple(f"n{number:08d}" for number in range(num_classes))
    return write(
        data_dir / "imagenet2012_real" / "1.0.0",
        "imagenet2012_real",
        {"validation": examples},
        names,
        image_shape=(-1, -1, 3),
        label="original_label",
        labels="real_label",
    )


def write(
    folder: Path,
    name: str,
    splits: dict[str, list[Example]],
    class_names: tuple[str, ...],
    *,
    image_shape: tuple[int, int, int],
    file_format: str = "array_record",
    shards: int = 1,
    label: str = "label",
    labels: str | None = None,
) -> Path:
    """Examples are (image, label), or (image, label, list of labels) where `labels` names a feature."""
    folder.mkdir(parents=True)
    class_label = {
        "pythonClassName": f"{_FEATURES}class_label_feature.ClassLabel",
        "classLabel": {"numClasses": str(len(class_names))},
    }
    features = {
        "file_name": {"pythonClassName": f"{_FEATURES}text_feature.Text", "text": {}},
        "image": {
            "pythonClassName": f"{_FEATURES}image_feature.Image",
            "image": {
                "dtype": "uint8",
                "shape": {"dimensions": [str(size) for size in image_shape]},
            },
        },
        label: class_label,
    }
    if labels is not None:
        features[labels] = {
            "pythonClassName": f"{_FEATURES}sequence_feature.Sequence",
            "sequence": {"feature": class_label, "length": "-1"},
        }
    _write_json(
        folder / "features.json",
        {
            "featuresDict": {"features": features},
            "pythonClassName": f"{_FEATURES}features_dict.FeaturesDict",
        },
    )
    lines = "".join(f"{class_name}\n" for class_name in class_names)
    (folder / f"{label}.labels.txt").write_text(lines)
    if labels is not None:
        (folder / f"{labels}-feature.labels.txt").write_text(lines)
    _write_json(
        folder / "dataset_info.json",
        {
            "fileFormat": file_format,
            "name": name,
            "splits": [
                {
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "name": split,
                    "numBytes": "1000",
                    "shardLengths": [
                        str(len(part)) for part in np.array_split(range(len(examples)), shards)
                    ],
                }
                for split, examples in splits.items()
            ],
            "version": folder.name,
        },
    )
    for split, examples in splits.items():
        for shard, indices in enumerate(np.array_split(range(len(examples)), shards)):
            path = folder / f"{name}-{split}.{file_format}-{shard:05d}-of-{shards:05d}"
            records = []
            for index in indices:
                image, *values = examples[index]
                named = dict(zip((label, labels), values, strict=False))
                records.append(_example(image, named, f"{split}_{index}"))
            if file_format == "tfrecord":
                path.write_bytes(b"".join(framed(record) for record in records))
                continue
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
    return folder


def framed(record: bytes) -> bytes:
    """A record as it stands in a TFRecord file."""
    length = struct.pack("<Q", len(record))
    sums = [struct.pack("<I", masked_crc(part)) for part in (length, record)]
    return length + sums[0] + record + sums[1]


def _example(image: bytes, labels: dict[str, int | list[int]], file_name: str) -> bytes:
    def of_bytes(value: bytes) -> tf_feature_pb2.Feature:
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))

    def of_integers(value: int | list[int]) -> tf_feature_pb2.Feature:
        values = [value] if isinstance(value, int) else value
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))

    feature = {
        "image": of_bytes(image),
        "file_name": of_bytes(file_name.encode()),
        **{name: of_integers(value) for name, value in labels.items()},
    }
    return tf_example_pb2.Example(
        features=tf_feature_pb2.Features(feature=feature)
    ).SerializeToString()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
