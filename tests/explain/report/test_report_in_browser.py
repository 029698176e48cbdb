"""The page in a real browser, against the arrays that it was made of."""

import numpy as np
import pytest
from browser import EXECUTABLE, NO_BROWSER, PageError, browser
from report_pages import found, network
from test_page import like_cait_xxs24

from cait_jax.explain.report.page import SMALL_LEVELS
from cait_jax.explain.report.quantise import quantise

pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason=NO_BROWSER)]
MAP = "[data-part=map]"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(page, write_page):
    """A function of the arguments of `page_of` that opens the page at the size of a desk's screen."""

    def open_(*names, **options):
        page.requests.clear()
        page.errors.clear()
        page.resize(1280, 900)
        page.open(write_page(*names, **options))
        return page

    yield open_
    assert page.errors == []
    outside = [url for url in page.requests if not url.startswith(("data:", "file:"))]
    assert outside == []
    assert len([url for url in page.requests if url.startswith("file:")]) == 1


def text(page, part, panel=0):
    return page.evaluate(f"panels[{panel}].part['{part}'].textContent")


def put(page, control, value):
    """Sets a control, as a user would."""
    page.evaluate(
        f"$('{control}').value = '{value}'; "
        f"$('{control}').dispatchEvent(new Event('input', {{bubbles: true}}))"
    )
    page.settle()


def numbers(page, of, panel=0):
    """The CSV of the dialog: the values of the patches, and those of special tokens."""
    page.press("n")
    page.evaluate(
        f"$('numbers-of').value = '{panel}:{of}'; $('numbers-of').dispatchEvent(new Event('change'))"
    )
    lines = [line.split(",") for line in page.evaluate("numbersCsv()").strip().split("\n")]
    page.press("Escape")
    assert not page.evaluate("$('numbers').open")
    rows = [line[1:] for line in lines[1:] if line[0].startswith("row")]
    special = [float(line[1]) for line in lines[1:] if line[0].endswith("token")]
    return np.array(rows, float), special


def stored(name, kind, layer, image=0, **options):
    levels = SMALL_LEVELS if options.get("head_means") else 256
    return quantise(found(name, **options)["self"][kind][layer][image], levels).values()


# The numbers


@pytest.mark.parametrize("name", ["cait", "distilled", "late"])
def test_every_number_of_self_attention_is_the_stored_one(opened, name):
    page = opened(name)
    model = network(name)
    patches, special = (model.image_size[0] // model.patch_size) ** 2, 0
    patch = patches // 2 + int(patches**0.5) // 2  # where the pointer is at first
    kinds = ("mixed_weights", "weights") if name == "cait" else ("weights",)
    for kind in kinds:
        page.press("Home")
        for layer in range(model.depth):
            values = stored(name, kind, layer)
            special = values.shape[-1] - patches
            for direction in ("reads", "read"):
                token = special + patch
                of_heads = values[:, token] if direction == "reads" else values[:, :, token]
                for expected in (of_heads.mean(0), of_heads.max(0), *of_heads):
                    grid, others = numbers(page, "main")
                    shown = np.concatenate([others, grid.ravel()])
                    np.testing.assert_allclose(shown, expected, rtol=1e-14)
                    page.press("h")
                page.press("r")
            page.press("]")
        page.press("m")
    assert special == {"cait": 0, "distilled": 2, "late": 1}[name]


def test_class_attention_rollout_and_relevance_are_the_stored_ones(opened):
    page = opened("cait")
    arrays = found("cait")
    rows = quantise(arrays["class_rows"]["mixed_weights"][0][0]).values().mean(axis=0)
    grid, own = numbers(page, "class_attention")
    np.testing.assert_allclose([*own, *grid.ravel()], rows, rtol=1e-14)
    maps = quantise(arrays["maps"][0].reshape(len(arrays["maps"][0]), -1)).values()
    for row, of in enumerate(("rollout", "random", "centre"), start=1):
        np.testing.assert_array_equal(numbers(page, of)[0].ravel(), maps[row])
    classes = arrays["classes"][0].tolist()
    for index in dict.fromkeys(classes):
        chosen = page.evaluate("panels[0].class")
        place = classes.index(index)
        assert chosen["index"] == index
        assert np.float32(chosen["probability"]) == arrays["probabilities"][0][place]
        np.testing.assert_array_equal(numbers(page, "relevance")[0].ravel(), maps[4 + place])
        for curve in ("deletion", "insertion"):
            curves = chosen["curves"]["relevance"][curve]
            np.testing.assert_array_equal(np.float32(curves), arrays[curve][0, 4 + place, place])
            area = np.trapezoid(curves, dx=1 / (len(curves) - 1))
            assert f"{area:.3f}" in text(page, "methods").split("Relevance")[1]
            assert f"{area:.3f}" in text(page, "curves")
        page.press("c")


def test_numbers_are_written_to_a_hundredth_of_the_step_which_is_shown(opened):
    page = opened("cait")
    page.press("h", "h")  # head 0
    values = stored("cait", "mixed_weights", 0)[0, 10]
    step = quantise(found("cait")["self"]["mixed_weights"][0][0]).step[0, 10]
    assert f"steps of {step:.2g}," in text(page, "step")
    assert f"±{step / 2:.2g} of" in text(page, "step")
    page.press("n")
    cells = page.evaluate(
        "[...$('numbers-table').querySelectorAll('td')].map((c) => c.textContent)"
    )
    page.press("Escape")
    np.testing.assert_allclose(np.array(cells, float), values, rtol=0, atol=step / 100)


def test_the_small_form_has_means_over_heads(opened):
    page = opened("cait", head_means=True)
    values = stored("cait", "mixed_weights", 0, head_means=True)
    np.testing.assert_array_equal(numbers(page, "main")[0].ravel(), values[0, 10])
    assert text(page, "caption") == "Layer 0, mean of 2 heads, after mixing"
    assert page.evaluate("$('head').disabled")


# Pointing, sliding, keys


def test_pointing_at_a_patch_shows_what_it_reads_and_a_click_holds_it(opened):
    page = opened("cait")
    page.mouse(MAP, 0.9, 0.1)
    values = stored("cait", "mixed_weights", 0).mean(axis=0)
    most = int(values[3].argmax())
    assert text(page, "reading").startswith(
        f"Patch 3 (row 0, column 3) reads most patch {most} (row {most // 4}, column {most % 4}): "
    )
    page.mouse(MAP, 0.9, 0.1, click=True)
    page.mouse(MAP, 0.3, 0.9)
    reading = text(page, "reading")
    assert reading.startswith("Patch 3 (row 0, column 3) reads patch 13 (row 3, column 1): ")
    shown = float(reading.split(": ")[1].split(" ±")[0])
    assert shown == pytest.approx(values[3, 13], abs=1e-3 * np.ptp(values[3]))
    page.evaluate("document.querySelector('[name=direction][value=read]').click()")
    page.settle()
    assert " is read by patch 13 (row 3, column 1)" in text(page, "reading")


def test_a_finger_points_by_a_tap_and_holds_by_a_second(opened):
    page = opened("cait")
    page.resize(360, 740, mobile=True)
    page.tap(MAP, 0.9, 0.1)
    assert text(page, "reading").startswith("Patch 3 (row 0, column 3) reads most ")
    page.tap(MAP, 0.9, 0.1)
    page.tap(MAP, 0.3, 0.9)
    assert " reads patch 13 (row 3, column 1): " in text(page, "reading")


def test_the_table_is_copied_as_csv(opened):
    page = opened("cait")
    page.command("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    page.press("n")
    page.mouse("#copy", 0.5, 0.5, click=True)
    page.wait("$('copied').textContent === 'Copied.'")
    assert page.evaluate("navigator.clipboard.readText()") == page.evaluate("numbersCsv()")
    page.press("Escape")


def test_the_map_drawn_is_brightest_where_the_value_is_largest(opened):
    page = opened("cait")
    page.press("Home", "m")
    put(page, "opacity", 100)
    most = int(stored("cait", "weights", 0).mean(axis=0)[10].argmax())
    column, row = most % 4, most // 4
    colour = page.evaluate(
        f"(() => {{ const c = panels[0].part.map; return [...c.getContext('2d').getImageData("
        f"c.width * {column + 0.3} / 4, c.height * {row + 0.3} / 4, 1, 1).data]; }})()"
    )
    np.testing.assert_allclose(colour, [0xFD, 0xE7, 0x25, 255], atol=2)


def test_a_cell_of_the_atlas_chooses_layer_head_and_direction(opened):
    page = opened("cait")
    at = page.evaluate("panels[0].layout")
    x = at["label"] + 1.5 * at["cell"] + at["gap"]
    y = 14 + 2.5 * at["cell"] + 2 * at["gap"]
    page.mouse("[data-part=atlas-read]", x / at["width"], y / at["height"], click=True)
    assert text(page, "caption") == "Layer 2, head 1, after mixing"
    assert "is read by" in text(page, "reading")


def test_sliding_and_choosing_by_the_controls(opened):
    page = opened("cait")
    for control, value, caption in (
        ("layer", 2, "Layer 2, mean of 2 heads, after mixing"),
        ("head", "max", "Layer 2, max of 2 heads, after mixing"),
        ("head", 1, "Layer 2, head 1, after mixing"),
    ):
        put(page, control, value)
        assert text(page, "caption") == caption
    page.evaluate("document.querySelector('[name=kind][value=weights]').click()")
    page.settle()
    assert text(page, "caption") == "Layer 2, head 1, before mixing"


def test_everything_has_a_key(opened):
    page = opened("distilled")

    def after(*keys):
        page.press(*keys)
        return text(page, "caption"), text(page, "reading").split(" reads ")[0].split(" is ")[0]

    assert after("ArrowUp", "ArrowLeft")[1] == "Patch 5 (row 1, column 1)"
    assert after("ArrowDown", "ArrowRight", "ArrowRight")[1] == "Patch 11 (row 2, column 3)"
    assert after("ArrowRight")[1] == "Patch 11 (row 2, column 3)"  # the border
    assert after("PageDown")[0] == "Layer 1, mean of 2 heads"
    assert after("[")[0] == "Layer 0, mean of 2 heads"
    assert after("]", "h")[0] == "Layer 1, max of 2 heads"
    assert after("h", "h")[0] == "Layer 1, head 1"
    assert after("H")[0] == "Layer 1, head 0"
    assert after("Enter", "ArrowLeft")[1] == "Patch 11 (row 2, column 3)"
    assert "reads patch 10 (row 2, column 2): " in text(page, "reading")
    assert after("Escape", "ArrowUp")[1] == "Patch 7 (row 1, column 3)"
    assert after("s")[1] == "The class token"
    assert after("s")[1] == "The distillation token"
    assert after("s", "r")[1] == "Patch 10 (row 2, column 2)"
    assert " is read by most " in text(page, "reading")
    first = page.evaluate("panels[0].class.index")
    page.press("c")
    assert page.evaluate("panels[0].class.index") != first
    page.press("C")
    assert page.evaluate("panels[0].class.index") == first
    page.press("l", "+", "+")
    assert page.evaluate("[state.power, Math.round(10 * state.opacity)]") == [0.5, 9]
    page.press("?")
    assert page.evaluate("$('help').open")
    page.press("Escape", "t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.wait(
        "$('status').textContent.startsWith('Layer 1, head 0. Patch 10 (row 2, column 2) is read by')"
    )


def test_a_token_that_joins_late_is_not_in_the_layers_before(opened):
    page = opened("late")
    page.press("s")
    assert text(page, "reading") == "The class token is not in this layer."
    page.press("]")
    assert text(page, "reading").startswith("The class token reads most patch ")


# Several networks and pictures


def test_two_networks_are_shown_side_by_side_under_one_pointer(opened):
    page = opened("cait", "late")
    assert page.evaluate("[...document.querySelectorAll('.panel')].map((p) => p.getAttribute('aria-label'))") == [
        "one.jpg seen by cait", "one.jpg seen by late",
    ]  # fmt: skip
    page.mouse(MAP, 0.9, 0.1)
    assert text(page, "reading").startswith("Patch 3 (row 0, column 3) reads")
    assert text(page, "reading", 1).startswith("Patch 1 (row 0, column 1) reads")
    lefts = page.evaluate("panels.map((panel) => panel.element.getBoundingClientRect().left)")
    assert lefts[1] > lefts[0] + 400


def test_two_pictures_are_compared_and_one_without_self_attention_says_so(opened):
    page = opened("cait", number=2, kept=1)
    assert page.evaluate("document.querySelectorAll('.panel').length") == 1
    page.evaluate("$('compare').click()")
    page.wait("panels.length === 2 && panels[1].view")
    page.settle()
    hidden = "[...document.querySelectorAll('[data-part=absent]')].map((e) => e.hidden)"
    assert page.evaluate(hidden) == [True, False]
    assert "name it by --self-attention" in text(page, "absent", 1)
    maps = found("cait", False, False)["maps"][1]
    rollout = quantise(maps.reshape(len(maps), -1)).values()[1]
    np.testing.assert_array_equal(numbers(page, "rollout", panel=1)[0].ravel(), rollout)


def test_a_network_without_a_head_shows_what_needs_no_class(opened):
    page = opened("headless")
    assert page.evaluate("[...document.querySelectorAll('.methods h3')].map((h) => h.textContent)") == [
        "Class attention", "Rollout",
    ]  # fmt: skip
    page.press("c", "n", "Escape")


# Everybody's page


@pytest.mark.parametrize("names", [("cait",), ("distilled", "cait")])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_scrolls_sideways(opened, names, width):
    page = opened(*names)
    page.resize(width, 740, mobile=width < 500)
    page.wait(f"document.documentElement.scrollWidth <= {width}")


def test_every_control_has_a_name_for_screen_readers(opened):
    page = opened("distilled", "cait", number=2)
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if not node["ignored"]
        and any(
            p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", ())
        )
    ]
    roles = {node["role"]["value"] for node in focusable}
    assert {"slider", "combobox", "radio", "button", "checkbox", "application"} <= roles
    unnamed = [n for n in focusable if not n.get("name", {}).get("value")]
    assert [n["role"]["value"] for n in unnamed if n["role"]["value"] != "main"] == []


def test_the_scheme_of_the_system_is_followed_until_another_is_chosen(opened):
    page = opened("cait")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.resize(1280, 900, dark=True)
    dark = page.evaluate(colour)
    assert light != dark
    page.press("t")
    assert page.evaluate(colour) == light


def test_nothing_can_leave_the_page(page, write_page):
    page.open(write_page("cait"))
    page.requests.clear()
    with pytest.raises(PageError):
        page.evaluate("fetch('http://127.0.0.1:9/')")
    for element, source in (("img", "x.png"), ("script", "x.js"), ("iframe", "x.html")):
        page.evaluate(
            f"(() => {{ const e = document.createElement('{element}'); "
            f"e.src = 'http://127.0.0.1:9/{source}'; document.body.append(e); }})()"
        )
    page.wait("document.querySelectorAll('iframe').length")
    page.settle()
    assert all("Content Security Policy" in error for error in page.errors)
    assert len(page.errors) >= 3


def test_the_smallest_cait_opens_in_three_seconds(page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(like_cait_xxs24(head_means=False), encoding="utf-8")
    page.resize(1280, 900)
    assert min(page.open(path) for _ in range(3)) < 3000  # other processes may be busy
    assert page.evaluate("Object.keys(panels[0].view.attention)") == ["weights", "mixed_weights"]
