"""`cait plot` on runs' metrics and records."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_commands import cait


@pytest.fixture
def run(tmp_path):
    """A directory as training leaves it."""
    rows = []
    for step in range(10, 101, 10):
        rows.append({"step": step, "train/loss": 2.0 / step, "train/grad_norm": 1.0 + 1 / step,
                     "train/learning_rate": step * 1e-5})  # fmt: skip
        if step % 50 == 0:
            rows.append({"step": step, "eval/loss": 3.0 / step, "eval/accuracy": step / 200})
    folder = tmp_path / "run"
    (folder / "inspect").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = np.random.default_rng(0)
    for step in (50, 100):
        np.savez(
            folder / "inspect" / f"{step:08d}.npz",
            layer_scale_1=rng.normal(size=(4, 16)),
            layer_scale_2=rng.normal(size=(4, 16)),
            branch_ratio=rng.uniform(0.1, 1, size=(6, 2)),
        )
    return folder


@pytest.mark.parametrize("options", [[], ["--layer-scale"], ["--branch-ratio"]], ids=str)
def test_pictures_of_runs(run, tmp_path, options):
    out, _ = cait("plot", run, "-o", tmp_path / "c.png", *options)
    assert out.strip() == str(tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 800
    first = (tmp_path / "c.png").read_bytes()
    cait("plot", run, "-o", tmp_path / "c.png", *options)
    assert (tmp_path / "c.png").read_bytes() == first


def test_several_runs_share_a_picture(run, tmp_path):
    cait("plot", run, run, "-o", tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    assert text.startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["nowhere"], 1, "nowhere is not a training run: there is no metrics.jsonl in it"),
        (["RUN", "-o", "c.bmp"], 1, "c.bmp must end in .png, .svg or .pdf"),
        (["RUN", "--watch", "-o", "c.png"], 1, "c.png must end in .html with --watch"),
        (["RUN", "RUN", "--layer-scale"], 2, "--layer-scale takes one RUN"),
        (["RUN", "--layer-scale", "--branch-ratio"], 2, "two pictures: ask for one"),
    ],
)
def test_mistakes_are_sentences(run, arguments, status, sentence):
    _, err = cait("plot", *(str(run) if a == "RUN" else a for a in arguments), status=status)
    assert sentence in err.splitlines()[-1]


def test_a_run_without_records_is_told_how_to_make_them(run):
    for file in (run / "inspect").iterdir():
        file.unlink()
    _, err = cait("plot", run, "--layer-scale", status=1)
    assert "train it with --config.report.inspect_every=100" in err


@pytest.mark.slow
def test_watch_refreshes_a_page_until_interrupted(run):
    # A shell that starts the tests in the background has them, and what they start, ignore SIGINT.
    program = "import signal, cait_jax.cli as cli; signal.signal(2, signal.default_int_handler); cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "plot", run, "--watch", "--every", "0.2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    page = run / "curves.html"
    try:
        times = set()
        end = time.monotonic() + 60
        while len(times) < 2 and time.monotonic() < end:
            if page.exists():
                times.add(page.stat().st_mtime_ns)
            time.sleep(0.05)
        assert len(times) == 2
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.strip() == f"{page}: open it in a browser; Ctrl-C ends"
    text = page.read_text()
    assert 'http-equiv="refresh" content="0.2"' in text
    assert len(re.findall('src="data:image/svg', text)) == 1


def test_a_long_path_takes_no_room_from_the_panels(run, tmp_path):
    """Matplotlib warns where it cannot fit a panel, and warnings are errors."""
    deep = tmp_path.joinpath(*(f"directory{i:02d}" * 4 for i in range(5)), "run")
    deep.parent.mkdir(parents=True)
    run.rename(deep)
    cait("plot", deep, "-o", tmp_path / "c.png")
    short = tmp_path / "short"
    deep.rename(short)
    cait("plot", short, "-o", tmp_path / "d.png")
    with Image.open(tmp_path / "c.png") as long, Image.open(tmp_path / "d.png") as other:
        assert long.size == other.size
