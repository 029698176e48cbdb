import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, log_loss
from tfds_files import write_imagenet2012

from cait_jax import UserError
from cait_jax.cli.common import command_options
from cait_jax.data.sources import load_split
from cait_jax.data.split import Encoded, InMemory
from cait_jax.errors import config_flags, python_arguments, speaking
from cait_jax.evaluation.labels import (
    Classes,
    LabelError,
    choose_classes,
    choose_rule,
    imagenet_classes,
    labels_among,
    match_classes,
    match_positions,
    metric_fn_for,
    read_labels,
)
from cait_jax.evaluation.metrics import compute_scores

MODEL = ("tench, Tinca tinca", "n01443537", "great_white_shark", "Cock", "hen", "crane", "crane")


def match(data, model=MODEL):
    return match_classes(data, model, len(MODEL)).tolist()


def split_of(labels, names):
    images = np.zeros((len(labels), 2, 2, 1), np.uint8)
    return InMemory(images, np.asarray(labels, np.int32), tuple(names))


def test_classes_are_found_by_name():
    assert match(["HEN", "cock", "Great White  Shark", "N01443537"]) == [4, 3, 2, 1]
    assert match(["tinca_tinca"]) == match(["Tench"]) == match(["tench, Tinca tinca"]) == [0]
    assert match(list(MODEL)) == list(range(7))  # the same names, though two of them are alike
    whole = ["maillot", "maillot, tank suit"]
    assert match_classes(["maillot"], whole, 2).tolist() == [0]


def test_wordnet_ids_equal_their_words():
    wnids, words = zip(*imagenet_classes(), strict=True)
    for data, model in ((wnids, words), (words, wnids), (wnids, wnids)):
        np.testing.assert_array_equal(match_classes(data, model, 1000), range(1000))
    some = [517, 0, 999, 134]
    assert match_classes([wnids[i] for i in some], wnids, 1000).tolist() == some
    assert match_classes([words[i] for i in some[1:3]], wnids, 1000).tolist() == some[1:3]
    assert match_classes(["Tench", wnids[999]], words, 1000).tolist() == [0, 999]
    with pytest.raises(UserError, match=r"could be more than one .* 'crane'"):
        match_classes(["tench", "crane"], wnids, 1000)


NUMBERS = [str(i) for i in range(12)]
AS_FOLDERS = sorted(NUMBERS)  # 0, 1, 10, 11, 2, ...


@pytest.mark.parametrize(
    ("data", "model", "expected"),
    [
        (AS_FOLDERS, NUMBERS, [int(name) for name in AS_FOLDERS]),
        (NUMBERS, AS_FOLDERS, [AS_FOLDERS.index(name) for name in NUMBERS]),
        (["3", "8"], NUMBERS, [3, 8]),
        (["03", "008", "11"], NUMBERS, [3, 8, 11]),
        (["7", "8"], ["007", "008", "dog"], [0, 1]),
        (["1", "01"], ["01", "1"], [1, 0]),  # as text they are two names
    ],
)
def test_numbers_are_names(data, model, expected):
    assert match_classes(data, model, len(model)).tolist() == expected


def test_numbers_that_could_be_two_are_refused():
    with pytest.raises(LabelError, match="are none of the model's 2: '01', '1'"):
        match_classes(["01", "1"], ["001", "2"], 2)
    with pytest.raises(LabelError, match="are none of the model's 12: '12'"):
        match_classes([str(i + 1) for i in range(12)], NUMBERS, 12)


def test_of_a_model_without_names_numbers_in_order_are_its_indices():
    for data in (NUMBERS[:10], NUMBERS, [f"{i:02}" for i in range(12)]):
        assert match_classes(data, None, len(data)).tolist() == list(range(len(data)))


@pytest.mark.parametrize(
    "data", [AS_FOLDERS, [str(i + 1) for i in range(12)], list("abcdefghijkl"), ["3", "8"], []]
)
def test_without_names_nothing_is_matched_by_its_place(data):
    of_command = command_options(
        {"class_names": "--class-names", "by_position": "--by-position"}, frozenset({"by_position"})
    )
    for interface, naming, by_position in (
        (python_arguments, "class_names=FILE", "by_position=True"),
        (of_command, "--class-names FILE", "--by-position"),
        (config_flags, None, None),
    ):
        with (
            speaking(interface),
            pytest.raises(LabelError, match="names of the model's 12 classes are not") as caught,
        ):
            match_classes(data, None, 12)
        sentence = str(caught.value)
        assert (f"give {by_position} if" in sentence) == (len(data) == 12 and naming is not None)
        assert naming is None or naming in sentence
        assert "\n" not in sentence


def test_names_of_words_and_of_numbers_do_not_meet():
    for data, model in ((list("abcdefg"), NUMBERS[:7]), (NUMBERS[:7], MODEL)):
        with pytest.raises(LabelError, match=r"7 of the data set's 7 .* by_position=True"):
            match(data, model)


def test_numbers_are_imagenets_indices_only_where_all_are_there():
    wnids = [wnid for wnid, _ in imagenet_classes()]
    folders = sorted(str(i) for i in range(1000))
    assert match_classes(folders, wnids, 1000).tolist() == [int(name) for name in folders]
    with pytest.raises(LabelError, match="none of the model's 1000: '17'"):
        match_classes(["17"], wnids, 1000)
    with pytest.raises(LabelError, match="none of the model's 1000"):
        match_classes(
            [str(i + 1) for i in range(1000)], wnids, 1000
        )  # ILSVRC2012_ID, another order


def test_by_position_counts_must_agree():
    assert match_positions(["x", "y"], 2).tolist() == [0, 1]
    with pytest.raises(UserError, match="has 1 classes and the model 2"):
        match_positions(["x"], 2)


def test_unicode_forms_and_case():
    assert match_classes(["cafe\u0301", "dog"], ["dog", "caf\u00e9"], 2).tolist() == [1, 0]
    assert match_classes(["cat", "Cat"], ["Cat", "cat"], 2).tolist() == [1, 0]
    with pytest.raises(LabelError, match="could be more than one of the model's 2: 'CAT'"):
        match_classes(["CAT"], ["Cat", "cat"], 2)


def test_labels_of_one_split_are_those_of_another():
    labels = np.array([2, 0, -1, 2], np.int32)
    found = labels_among(["b", "c", "a"], ["a", "x", "c"], labels)  # x does not occur
    assert found.tolist() == [1, 2, -1, 1]
    assert labels_among(["crane"] * 3, ["crane"] * 3, labels).tolist() == labels.tolist()
    with pytest.raises(UserError, match="cannot be found in the split to learn from: c; choose"):
        labels_among(["a", "b"], ["a", "b", "c"], labels)


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        (["hem", "cock", "dog"], MODEL, "2 of the data set's 3 .* 7: 'hem', 'dog' .nearest: hen"),
        (["crane"], MODEL, "could be more than one of the model's 7: 'crane'"),
        (["hen"], None, r"names of the model's 7 classes .* the data set's 1 \('hen'\)"),
        (["0", "1"], MODEL, "2 of the data set's 2 classes are none of the model's 7"),
        (["hen"], MODEL[:3], "3 class names were given for a model of 7"),
    ],
)
def test_what_does_not_match_is_named(data, model, words):
    with pytest.raises(UserError, match=words) as caught:
        match(data, model)
    assert "\n" not in str(caught.value)


def test_all_the_names_of_imagenet_are_not_listed():
    names = [f"n{i:08d}" for i in range(1000)]
    with pytest.raises(UserError) as caught:
        match_classes(["zebra crossing"], names, 1000)
    assert len(str(caught.value)) < 200


def test_labels_are_read_without_decoding(tmp_path):
    write_imagenet2012(tmp_path, {"validation": [(b"no image", i % 7) for i in range(600)]})
    split = load_split("imagenet2012", "validation", image_size=(8, 8), data_dir=str(tmp_path))
    np.testing.assert_array_equal(read_labels(split), np.arange(600) % 7)


class Unreadable:
    """Records that know their labels; reading one fails."""

    labels = np.array([2, 0], np.int32)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise AssertionError


def test_labels_of_other_records():
    assert read_labels(Encoded(Unreadable(), ("a",), 3)).tolist() == [2, 0]
    records = [{"image": b"", "label": 4}, {"image": b"", "label": 1}]
    assert read_labels(Encoded(records, ("a",), 3)).tolist() == [4, 1]
    assert read_labels(split_of([1, 0], "ab")).tolist() == [1, 0]


def test_default_rules():
    assert choose_rule(split_of([0], "abc"), 3) == "all"
    assert choose_rule(split_of([0], "abc"), 4) == "restricted"
    assert choose_rule(Encoded([], ("a", "b"), 3, multi_label=True), 2) == "real"


def test_the_classes_that_occur_compete():
    split = split_of([3, 1, 3, -1], "abcde")
    classes = choose_classes(split, "restricted", 5, "abcde")
    assert classes.columns.tolist() == [1, 3]
    assert classes.index.tolist() == [-1, 0, -1, 1, -1]
    assert classes.names == ("b", "d")
    every = choose_classes(split, "all", 5, by_position=True)
    assert (classes.matched, every.matched) == ("name", "position")
    assert every.columns is None
    assert every.names == ("a", "b", "c", "d", "e")


def test_names_are_the_models_own_where_they_are_known():
    classes = choose_classes(split_of([0, 1], ["hen", "tinca tinca"]), "all", 7, MODEL)
    assert classes.index.tolist() == [4, 0]
    assert classes.names == MODEL


def test_one_class_is_no_competition():
    split = split_of([1, 1], "ab")
    for interface, rule in (
        (python_arguments, "rule='all'"),
        (command_options({"rule": "--rule"}), "--rule all"),
    ):
        with (
            speaking(interface),
            pytest.raises(LabelError, match=f"one of the model's 3 classes, 'b', .* {rule}"),
        ):
            choose_classes(split, "restricted", 3, "abc")
    assert choose_classes(split, "all", 3, "abc").names == ("a", "b", "c")
    with pytest.raises(UserError, match="a model of one class is right whatever it sees"):
        choose_classes(split_of([0], "a"), "all", 1, "a")


def test_unfit_rules():
    split = split_of([0], "ab")
    with pytest.raises(UserError, match="nearest: restricted"):
        choose_classes(split, "restrict", 2)
    with pytest.raises(UserError, match="needs any number of labels"):
        choose_classes(split, "real", 2)


def measured(rule, classes, logits, **batch):
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    batch |= {"mask": jnp.ones(len(logits), bool)}
    sums = jax.jit(metric_fn_for(rule, classes))(jnp.asarray(logits), batch)
    return compute_scores(sums, classes.names)


@pytest.fixture(scope="module")
def logits():
    return (2 * np.random.default_rng(0).standard_normal((200, 9))).astype(np.float32)


def test_restriction_is_minus_infinity_elsewhere(logits):
    """As on ImageNet-A: the data set's labels are the model's, and some of them never occur."""
    occurring = np.array([1, 2, 5, 6, 7, 8])
    labels = np.random.default_rng(1).choice(occurring, 200).astype(np.int32)
    split = split_of(labels, "abcdefghi")
    found = measured(
        "restricted", choose_classes(split, "restricted", 9, "abcdefghi"), logits, label=labels
    )

    masked = np.full_like(logits, -np.inf)
    masked[:, occurring] = logits[:, occurring]
    probabilities = np.exp(np.float64(masked))
    probabilities /= probabilities.sum(-1, keepdims=True)
    order = np.argsort(-masked, axis=-1)
    assert found["top1"] == np.mean(order[:, 0] == labels)
    assert found["top5"] == np.mean((order[:, :5] == labels[:, None]).any(-1))
    assert found["top1"] > np.mean(logits.argmax(-1) == labels)
    expected = log_loss(labels, probabilities[:, occurring], labels=occurring)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    matrix = confusion_matrix(labels, masked.argmax(-1), labels=occurring)
    np.testing.assert_array_equal(found["confusion"], matrix)
    assert found["class_names"] == list("bcfghi")


def test_labels_of_another_order_and_of_one_class_under_two_names(logits):
    classes = choose_classes(
        split_of([0, 1, 2], ["hen", "tench", "tinca tinca"]), "all", 9, (*MODEL[:5], *"xyzw")
    )
    labels = np.tile(np.array([0, 1, 2, -1], np.int32), 50)
    found = measured("all", classes, logits, label=labels)
    true = np.array([4, 0, 0, -1])[labels]
    assert found["counted"] == 150
    assert found["top1"] == np.mean(logits.argmax(-1)[labels >= 0] == true[labels >= 0])


def test_several_labels_of_another_order(logits):
    """Two of the labels are one class of the model."""
    index = np.array([8, 3, 0, 3], np.int32)
    classes = Classes(None, index, tuple("abcdefghi"))
    labels = np.random.default_rng(2).random((200, 4)) < 0.4
    found = measured("real", classes, logits, labels=labels, label=np.zeros(200, np.int32))
    right = [
        predicted in index[row]
        for predicted, row in zip(logits.argmax(-1), labels, strict=True)
        if row.any()
    ]
    assert 0 < sum(right) < len(right)
    assert (found["counted"], found["top1"]) == (len(right), np.mean(right))
