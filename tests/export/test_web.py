"""The page of `cait export --to web` in Chromium, served by Python's own server, against JAX.

`CAIT_JAX2ONNX` names the environment of `cait export --to onnx`, `CAIT_ORT_WEB` a folder with onnxruntime-web.
"""

import base64
import functools
import http.server
import io
import os
import tarfile
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from browser import EXECUTABLE, NO_BROWSER, browser
from export_networks import network
from PIL import Image

from cait_jax import UserError, create_model
from cait_jax.export import web
from cait_jax.export.forward import to_export
from cait_jax.export.web import check_web, export_web, runtime_files

ENVIRONMENT, RUNTIME = os.environ.get("CAIT_JAX2ONNX"), os.environ.get("CAIT_ORT_WEB")
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason=NO_BROWSER),
    pytest.mark.skipif(
        ENVIRONMENT is None or RUNTIME is None,
        reason="CAIT_JAX2ONNX and CAIT_ORT_WEB name no environment and no onnxruntime-web",
    ),
]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        del arguments


@pytest.fixture(scope="module")
def open_page(tmp_path_factory):
    """A function of a network's name that exports it and opens its page; one browser for all."""
    servers = []
    with browser(tmp_path_factory.mktemp("profile")) as page:

        @functools.cache
        def served(name):
            model, variables, preprocessing = network(name)
            folder = tmp_path_factory.mktemp("web")
            words = [f"class <b>{i}</b>" for i in range(5)]
            export_web(
                folder, model, variables, name=name, environment=ENVIRONMENT, runtime=RUNTIME,
                preprocessing=preprocessing, label_names=words,
            )  # fmt: skip
            handler = functools.partial(_Quiet, directory=str(folder))
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.append(server)
            return f"http://127.0.0.1:{server.server_port}/"

        def open_(name):
            url = served(name)
            page.errors.clear()
            page.requests.clear()
            page.resize(1280, 900)
            page.command("Page.navigate", url=url)
            page.wait("document.documentElement.dataset.ready")
            return page

        yield open_
    for server in servers:
        server.shutdown()
        server.server_close()


def png(size, seed, mode="RGB"):
    """A smooth picture, encoded."""
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "L": 1}[mode]
    pixels = rng.integers(0, 256, (7, 9, channels), np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).resize(
        size, Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def blob(data):
    text = base64.b64encode(data).decode()
    return f"new Blob([Uint8Array.from(atob('{text}'), (c) => c.charCodeAt(0))])"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=in_browser) for n in ("cait", "mean", "grey")]
)
def test_the_page_sees_what_jax_sees(open_page, name):
    page = open_page(name)
    model, variables, preprocessing = network(name)
    attention = name != "mean"
    exported = to_export(
        model, variables, preprocessing, uint8=True, attention=attention, stacked=False
    )
    for seed, size in enumerate([(91, 60), (40, 77), (20, 20), (36, 35)]):
        data = png(size, seed)
        found = page.evaluate(f"look({blob(data)}).then((x) => ({{...x, crop: [...x.crop]}}))")
        crop = preprocessing.crop(data)
        assert found["crop"] == crop.reshape(-1).tolist()
        expected = exported.function(exported.variables, jnp.asarray(crop[None]))
        scale = np.abs(expected[0]).max()
        np.testing.assert_allclose([found["logits"]], expected[0], atol=1e-5 * scale)
        if attention:
            assert found["attention"]["shape"] == [2, 2]
            np.testing.assert_allclose(
                found["attention"]["data"], np.ravel(expected[1]), rtol=1e-4, atol=1e-6
            )
    assert page.errors == []


@pytest.mark.parametrize("name", [pytest.param("cait", marks=in_browser)])
def test_a_picture_gets_bars_and_a_map_and_nothing_leaves(open_page, name):
    page = open_page(name)
    model, variables, preprocessing = network(name)
    data = png((91, 60), 0)
    page.evaluate(f"classify({blob(data)})")
    page.wait("document.documentElement.dataset.looked")
    logits = np.asarray(model.apply(variables, preprocessing(data)))[0]
    words = page.evaluate(
        "[...document.querySelectorAll('li span:first-child')].map((e) => e.textContent)"
    )
    assert words == [f"class <b>{i}</b>" for i in np.argsort(-logits)]
    shown = page.evaluate("[...document.querySelectorAll('meter')].map((e) => e.value)")
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(shown, np.sort(probabilities)[::-1], atol=1e-5)
    drawn = "$('attention').getContext('2d').getImageData(0, 0, 32, 32).data.some((x) => x > 0)"
    assert page.evaluate(drawn)
    page.evaluate("$('show').click()")
    assert page.evaluate("$('attention').hidden")
    page.evaluate(f"classify({blob(b'no picture')})")
    page.wait("$('status').textContent.startsWith('This picture cannot be read')")
    for width in (1280, 360):
        page.resize(width, 800)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    origin = page.evaluate("location.origin")
    assert all(url.startswith((origin, "data:", "blob:")) for url in page.requests)
    assert page.errors == []


def test_what_a_page_cannot_show_is_refused():
    headless, _, preprocessing = network("headless")
    with pytest.raises(UserError, match="no head"):
        check_web(headless, preprocessing)
    with pytest.raises(UserError, match="preprocessing, which is not known"):
        check_web(network("cait")[0], None)
    with pytest.raises(UserError, match=r"4\.5 GB of weights, and a page loads at most 2\.1"):
        check_web(create_model("vit_giant_patch14_dinov2.lvd142m", num_classes=2), preprocessing)


def test_the_runtime_is_asked_for_and_looked_at(tmp_path):
    with pytest.raises(UserError, match=r"give runtime=DIR, .* or download_runtime=True"):
        runtime_files(None, download=False).__enter__()
    with pytest.raises(UserError, match=r"has no ort\.wasm\.min\.js"):
        runtime_files(tmp_path, download=False).__enter__()


def test_the_runtime_is_downloaded_by_npm(tmp_path, monkeypatch):
    """A stand-in for npm packs three files."""
    (tmp_path / "dist").mkdir()
    archive = tmp_path / "made.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for name in web._RUNTIME_FILES:
            (tmp_path / "dist" / name).write_text(name)
            file.add(tmp_path / "dist" / name, f"package/dist/{name}")
    npm = tmp_path / "npm"
    npm.write_text(
        f'#!/bin/sh\ncp {archive} "$5/onnxruntime-web.tgz"\necho "$2" > {tmp_path}/asked\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with runtime_files(None, download=True) as files:
        assert [path.read_text() for path in files] == list(web._RUNTIME_FILES)
    assert (tmp_path / "asked").read_text().strip() == web.RUNTIME
    npm.write_text("#!/bin/sh\necho 'npm error 404 Not Found' >&2\nexit 1\n")
    with pytest.raises(
        UserError, match=r"npm error 404 Not Found\): try again, or give runtime=DIR"
    ):
        runtime_files(None, download=True).__enter__()
