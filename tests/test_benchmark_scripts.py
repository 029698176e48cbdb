"""Every script of benchmarks/ starts, and says how it is called."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
# timm's side runs in an environment of its own, with PyTorch, and takes commands instead of options.
OURS = [script for script in SCRIPTS if script.name != "speed_torch.py"]


@pytest.mark.parametrize("script", OURS, ids=lambda script: script.stem)
def test_a_benchmark_prints_its_command_and_options(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert f"Command: python benchmarks/{script.name}" in " ".join(printed.split())
    assert "--help" in printed


def test_timms_side_is_importable_where_timm_is():
    (script,) = set(SCRIPTS) - set(OURS)
    compile(script.read_text(), str(script), "exec")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    assert callable(runpy.run_path(str(script))["main"])


def test_the_code_base_in_figures(tmp_path):
    figures = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "codebase.py"))[
        "figures"
    ]
    package = tmp_path / "cait_jax"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "one.py").write_text("a = 1\nb = 2\n")
    (package / "train").mkdir(parents=True)
    (package / "__init__.py").write_text('"""One line."""\n')
    (package / "train" / "loop.py").write_text(
        '"""Two\nlines."""\n\n\ndef f():\n    """One."""\n    "no docstring"\n    return 1\n\n'
    )
    (tmp_path / "README.md").write_text("# Three words\n")
    assert dict(figures(tmp_path)) == {
        "modules of cait_jax": "1",
        "lines of cait_jax": "10",
        "largest module": "cait_jax/train/loop.py, 9 lines",
        "docstrings' share of the lines": "40.0%",
        "configs": "1 files, 2 lines",
        "README.md": "1 lines, 3 words",
        "lines of tests": "0",
    }
