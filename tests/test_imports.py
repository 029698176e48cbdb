"""Every name of the package that code outside it imports exists, code that tests run rarely too."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for pattern in (
        "*.py",
        "*.md",
        "configs/*.py",
        "benchmarks/*.py",
        "docs/**/*.md",
        "notebooks/*.ipynb",
    )
    for path in ROOT.glob(pattern)
)


def _sources(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        code = ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
        return [re.sub(r"(?m)^[%!].*$", "", source) for source in code]
    if path.suffix == ".md":
        return re.findall(r"(?ms)^```python\n(.*?)^```", text)
    return [text]


def _missing(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cait_jax":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "cait_jax":
                    try:
                        importlib.import_module(alias.name)
                    except ModuleNotFoundError:
                        yield alias.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imported_names_exist(path):
    assert not [name for source in _sources(path) for name in _missing(source)]


def test_a_name_that_moved_is_found():
    assert list(_missing("from cait_jax.train.resume import read_metrics")) == [
        "cait_jax.train.resume.read_metrics"
    ]
    assert not list(_missing("from cait_jax import models\nimport cait_jax.train.metrics"))
