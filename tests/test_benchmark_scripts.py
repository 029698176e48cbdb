"""Every script of benchmarks/ starts, and says how it is called."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
from flax import serialization

SCRIPTS = sorted(
    path
    for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py")
    if path.name != "reports.py"  # what they share
)
# timm's side runs in an environment of its own, with PyTorch, and takes commands instead of options.
OURS = [script for script in SCRIPTS if not script.stem.endswith("_torch")]


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


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - set(OURS)), ids=lambda script: script.stem)
def test_timms_side_is_importable_where_timm_is(script):
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


def _run(name, monkeypatch):
    """The names of a script."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return runpy.run_path(str(folder / name))


def test_the_ladder_reports_finished_runs_and_names_the_others(tmp_path, monkeypatch, capsys):
    ladder = _run("ladder.py", monkeypatch)
    epoch = {"loss": 2.0, "accuracy": 0.0, "seconds": 8.0}
    for seed, accuracies in enumerate([[20.0] * 14 + [30.0], [20.0] * 14 + [32.0], [20.0] * 7]):
        history = [{**epoch, "accuracy": accuracy} for accuracy in accuracies]
        content = {"state": {}, "history": json.dumps(history)}
        file = tmp_path / f"one_head_seed{seed}.msgpack"
        file.write_bytes(serialization.msgpack_serialize(content))
    ladder["report"](tmp_path, ["one_head", "four_heads"], seeds=3)
    lines = capsys.readouterr().out.splitlines()
    assert "| one_head | 79,178 | 31.0 ± 1.4 | 26.5 | 2 | 8.0 |" in lines
    assert "| four_heads | 79,178 |  | 33.9 | 0 |  |" in lines
    assert "missing: one_head, seed 2 (7 of 15 epochs)" in lines
    assert lines[-1].startswith("missing: four_heads, seed 0 (0 of 15 epochs), seed 1")

    results = tmp_path / "ladder.jsonl"
    history = [{**epoch, "accuracy": 34.0}] * 15
    ladder["append_line"](results, {"rung": "one_head", "seed": 2, "history": history})
    ladder["report"](tmp_path, ["one_head"], seeds=3, results=results)
    assert "| one_head | 79,178 | 32.0 ± 2.0 | 26.5 | 3 | 8.0 |" in capsys.readouterr().out


def test_a_study_tabulates_finished_runs_and_names_the_others(tmp_path, monkeypatch):
    study = _run("study.py", monkeypatch)
    results = tmp_path / "heads.jsonl"
    assert study["finished"](results) == {}
    line = {
        "arm": "2 heads",
        "eval_loss": 1.5,
        "train_loss": 1.25,
        "grad_norm": 2.0,
        "parameters": 1000,
    }
    for seed, accuracy in enumerate([0.5, 0.52]):
        study["append_line"](
            results, {**line, "seed": seed, "accuracy": accuracy, "diverged": False}
        )
    nothing = dict.fromkeys(("accuracy", "eval_loss", "train_loss", "parameters"))
    study["append_line"](
        results, {"arm": "4 heads", "seed": 0, "grad_norm": 9.0, "diverged": True, **nothing}
    )
    found = study["finished"](results)
    assert set(found) == {("2 heads", 0), ("2 heads", 1), ("4 heads", 0)}
    lines = study["table"](study["STUDIES"]["heads"], found, 2).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert cells == [
        [
            "2 heads",
            "1,000",
            "51.0 ± 1.4",
            "1.500 ± 0.000",
            "1.250 ± 0.000",
            "2.00 ± 0.00",
            "0",
            "2",
        ],
        ["4 heads", "0", "", "", "", "9.00", "1", "1"],
    ]
    assert lines[-1].startswith(
        "missing: 2 talking heads, seed 0; 2 talking heads, seed 1; 4 heads, seed 1"
    )


def test_pre_trainings_are_of_the_network_that_is_fine_tuned(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS[0].parent))
    from studies.pretraining import config_of
    from studies.runs import Job

    supervised, *others = (
        config_of(kind, Job("", tmp_path, "arm"), steps=100)
        for kind in ("supervised", "mae", "dino")
    )
    assert all(other.model == supervised.model for other in others)
    assert {other.batch_size for other in others} == {supervised.batch_size}
