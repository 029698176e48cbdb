"""The notebooks run from a clean kernel on small data, and what is committed has its outputs."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SECONDS = 600  # of one cell


@each_notebook
def test_a_committed_notebook_has_the_outputs_of_one_run(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output["ename"] for output in outputs if output["output_type"] == "error"]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    for cell in code:  # what draws or prints has drawn or printed
        if "print(" in "".join(cell["source"]) or "plt.show()" in "".join(cell["source"]):
            assert cell["outputs"] or _only_defines(cell), "".join(cell["source"])
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 1_500_000


def _only_defines(cell):
    lines = "".join(cell["source"]).splitlines()
    return not [line for line in lines if re.match(r"(?!def |class |@|import |from |\s|$|#)", line)]


@each_notebook
def test_a_committed_notebook_names_no_machine(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        texts = ["".join(cell["source"])]
        for output in cell.get("outputs", []):
            data = {k: v for k, v in output.get("data", {}).items() if k.startswith("text/")}
            texts += ["".join(output.get("text", [])), *("".join(text) for text in data.values())]
        for text in texts:
            assert not re.search(
                r"(?<![\w.\]])/(home|root|tmp|work|Users|opt|usr|var|mnt)/", text
            ), text


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_a_clean_kernel(path, tmp_path, monkeypatch, compilation_cache):
    nbclient = pytest.importorskip(
        "nbclient", reason='nbclient is not installed: pip install ".[notebooks]"'
    )
    pytest.importorskip(
        "ipykernel", reason='ipykernel is not installed: pip install ".[notebooks]"'
    )
    import nbformat

    root = str(path.parents[1])
    for name, value in compilation_cache.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NOTEBOOKS_SMALL", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most of the time is compilation
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, *filter(None, sys.path)]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    strict = (
        "import warnings; warnings.simplefilter('error');"
        "warnings.filterwarnings('ignore', module='ipykernel')"  # its own, at its end
    )
    notebook.cells.insert(0, nbformat.v4.new_code_cell(strict))
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
