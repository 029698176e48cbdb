"""Splits with any number of right classes an image, as ImageNet-ReaL."""

import numpy as np
import pytest
from tfds_files import numbered_jpeg, write_imagenet_real

from cait_jax.data import Encoded, eval_batches, load_split

LABELS = ([1, 2], [], [3], [0, 5, 7], [4])


@pytest.fixture
def split(tmp_path):
    examples = [(numbered_jpeg(i, 16, 16), i, labels) for i, labels in enumerate(LABELS)]
    write_imagenet_real(tmp_path, examples, num_classes=8)
    return load_split(
        "imagenet2012_real", "validation", image_size=(16, 16), data_dir=str(tmp_path)
    )


def test_records_have_the_original_label_and_all_the_others(split):
    assert isinstance(split, Encoded)
    assert split.multi_label
    assert split.class_names[7] == "n00000007"
    for records in ([split.records[i] for i in range(5)], split.records.__getitems__(range(5))):
        assert [record["label"] for record in records] == list(range(5))
        assert [list(record["labels"]) for record in records] == list(LABELS)
        assert records[2]["image"] == numbered_jpeg(2, 16, 16)


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_have_a_column_a_class(split, processes):
    batches = [
        list(
            eval_batches(
                split,
                batch_size=4,
                image_size=(16, 16),
                process_index=index,
                process_count=processes,
            )
        )
        for index in range(processes)
    ]
    steps = zip(*batches, strict=True)
    labels = np.concatenate([part["labels"] for step in steps for part in step])
    assert (labels.shape, labels.dtype) == ((8, 8), np.bool_)
    assert [np.flatnonzero(row).tolist() for row in labels] == [*map(sorted, LABELS), [], [], []]
