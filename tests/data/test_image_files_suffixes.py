import subprocess
import sys

import pytest
from PIL import features

from cait_jax.data import image_files, opening
from cait_jax.data.image_files import SUFFIXES, missing_decoder, readable_suffixes


@pytest.fixture(autouse=True)
def _suffixes_are_looked_up_again():
    readable_suffixes.cache_clear()
    yield
    readable_suffixes.cache_clear()


def test_suffixes_are_known_in_lower_case():
    assert SUFFIXES[".jfif"] == SUFFIXES[".jpe"] == SUFFIXES[".jpg"] == "JPEG"
    assert SUFFIXES[".heic"] == SUFFIXES[".hif"] == "HEIF"
    assert SUFFIXES[".avif"] == "AVIF"
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in SUFFIXES)
    assert opening.missing_decoder is missing_decoder


def test_what_is_missing_for_heif(monkeypatch):
    monkeypatch.setattr(image_files.importlib.util, "find_spec", lambda name: None)
    assert missing_decoder(".HEIC") == missing_decoder(".hif") == 'pip install "cait-jax[heif]"'
    assert ".heic" not in readable_suffixes()
    readable_suffixes.cache_clear()
    monkeypatch.setattr(image_files.importlib.util, "find_spec", lambda name: object())
    assert missing_decoder(".heic") is None
    assert ".heic" in readable_suffixes()


def test_what_is_missing_for_avif(monkeypatch):
    monkeypatch.setattr(features, "get_supported", lambda: ["webp", "avif"])
    assert missing_decoder(".avif") is None
    monkeypatch.setattr(features, "get_supported", lambda: ["webp"])
    assert missing_decoder(".avif") == 'pip install "pillow>=11.3"'
    assert ".avif" not in readable_suffixes()


def test_nothing_is_missing_for_others():
    assert missing_decoder(".jfif") is None
    assert missing_decoder(".dcm") is None


def test_suffixes_load_no_decoder():
    code = (
        "import sys, cait_jax.data.image_files; print({'PIL', 'cv2', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "PIL" not in run.stdout
    assert "cv2" not in run.stdout
