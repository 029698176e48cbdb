import importlib.resources

from cait_jax.evaluation.labels import class_words, imagenet_classes


def test_there_are_a_thousand_classes_in_the_order_of_their_ids():
    wnids = [wnid for wnid, _ in imagenet_classes()]
    assert len(wnids) == 1000
    assert wnids == sorted(set(wnids))
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)


def test_the_words_are_those_of_the_label():
    words = [words for _, words in imagenet_classes()]
    assert words[0] == "tench, Tinca tinca"
    assert words[2].startswith("great white shark, white shark, man-eater")
    assert words[134] == words[517] == "crane"
    assert words[207] == "golden retriever"
    assert words[281] == "tabby, tabby cat"
    assert words[837] == "sunglasses, dark glasses, shades"
    assert words[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert len(set(words)) == 999
    assert not any("_" in each or each != each.strip() for each in words)


def test_ids_become_words_and_other_names_stay():
    names = class_words(["n02099601", "dog", "n00000000", "n03126707"])
    assert names == ("golden retriever", "dog", "n00000000", "crane")
    assert class_words([]) == ()


def test_the_table_and_its_licence_lie_in_the_package():
    package = importlib.resources.files("cait_jax.evaluation")
    table = package.joinpath("imagenet_classes.tsv").read_text(encoding="utf-8")
    licence = package.joinpath("LICENSE.wordnet").read_text(encoding="utf-8")
    assert "LICENSE.wordnet" in table
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence
    assert "Permission to use, copy, modify and distribute" in licence
