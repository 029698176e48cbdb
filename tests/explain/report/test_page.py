"""The page as a file: one, whole, within its sizes."""

import json
import re

import numpy as np
from report_pages import CLASSES, WORDS, page_of

from cait_jax import create_model
from cait_jax.explain.report.page import Seer, View, build_page


def test_the_page_names_nothing_outside_itself_and_forbids_it():
    page = page_of("cait")
    sources = re.sub(r'<script type="application/[^<]*</script>', "", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", sources)
    assert not re.search(
        r"@import|url\(|\bimport\b\s*[({\"']|XMLHttpRequest|fetch\(|WebSocket", sources
    )
    assert set(re.findall(r"https?://[\w./]+", sources)) == {"http://www.w3.org/2000/svg"}  # a name
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy


def test_names_of_files_and_classes_stay_text():
    page = page_of("cait", "distilled", number=2)
    assert page.count("</script>") == len(re.findall("<script", page))
    assert "<i>two" not in page
    assert "<b>finch" not in page
    manifest = json.loads(re.search('id="manifest">(.*?)</script>', page)[1])
    assert manifest["images"][1] == "<i>two</i>.jpg"
    shown = {each["word"] for view in manifest["views"] for each in view["classes"]}
    assert shown == {WORDS[i] for i in CLASSES}


def test_a_class_asked_for_that_is_among_the_most_probable_is_shown_once():
    manifest = json.loads(re.search('id="manifest">(.*?)</script>', page_of("cait"))[1])
    for view in manifest["views"]:
        indices = [each["index"] for each in view["classes"]]
        assert indices == [5, 0, 3, 6]


def like_cait_xxs24(*, head_means):
    """A page of cait_xxs24 at 224 pixels with maps that hardly compress: near uniform, as of random weights."""
    model = create_model("cait_xxs24")
    rng = np.random.default_rng(0)
    heads = 1 if head_means else 4

    def maps(*shape):
        return (1 / 196 + 1e-4 * rng.standard_normal(shape)).astype(np.float32)

    kinds = ("weights", "mixed_weights")
    found = {
        "self": {kind: [maps(heads, 196, 196) for _ in range(24)] for kind in kinds},
        "class_rows": {kind: [maps(heads, 197) for _ in range(2)] for kind in kinds},
        "maps": maps(9, 14, 14),
        "classes": np.arange(5),
        "probabilities": rng.random(5).astype(np.float32),
        "deletion": rng.random((9, 5, 15)).astype(np.float32),
        "insertion": rng.random((9, 5, 15)).astype(np.float32),
    }
    noise = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
    photograph = noise.repeat(4, axis=0).repeat(4, axis=1)
    seer = Seer("cait_xxs24", model, [f"class {i}" for i in range(1000)])
    return build_page([seer], ["dog.jpg"], [View(0, 0, photograph, found)], head_means=head_means)


def test_the_smallest_cait_takes_at_most_10_mb_and_2_in_the_small_form():
    assert 8e6 < len(like_cait_xxs24(head_means=False).encode()) <= 10e6
    assert len(like_cait_xxs24(head_means=True).encode()) <= 2e6
