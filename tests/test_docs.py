"""Every block of the documentation runs, or says why not and is read by the program it calls.

A block that is not run has the reason above it: `<!-- not run: needs ImageNet -->`.
"""

import argparse
import ast
import dataclasses
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import jax
import numpy as np
import pytest
from click.testing import CliRunner
from hub_server import serve_hub
from marks import slow_unless
from PIL import Image
from trees import random_params

import cait_jax
from cait_jax.cli import main
from cait_jax.train.config import check_values, flatten, get_config, load_config, parse_command_line
from cait_jax.weights.hub import RELEASED

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
# What is told of the past keeps its names.
HISTORY = {"CHANGELOG.md", "docs/design.md"}
TRAIN_FLAGS = {"config", "workdir", "distributed", "coordinator", "processes", "process"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
DOWNLOADED = ("cait_xs24_384", "cait_xxs24_224")  # by blocks that run
FILES = (
    "configs",
    "train.py",
    "benchmarks",
    "constraints.txt",
)  # of the repository, for the blocks


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    number: int
    language: str
    code: str
    reason: str | None

    def __str__(self):
        return f"{self.page}:{self.number}"


BLOCKS = [
    Block(page, number, found["language"], found["code"], found["reason"])
    for page, text in PAGES.items()
    for number, found in enumerate(BLOCK.finditer(text), 1)
]
RUN = [block for block in BLOCKS if block.reason is None]


def test_every_block_is_of_a_language_that_is_tested():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "toml", "yaml", "text"}
    assert sum(text.count("```") for text in PAGES.values()) == 2 * len(BLOCKS)
    assert {"README.md", "docs/index.md", "docs/models.md"} <= {block.page for block in RUN}


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_a_python_block_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block.code, str(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = hasattr(module, alias.name)
                assert found or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=str)
def test_a_shell_block_is_read_by_what_it_calls(block, tmp_path, monkeypatch):
    """bash reads it whole; `cait`, `train.py`, benchmarks and scripts know every option and file."""
    checked = subprocess.run(
        ["bash", "-n"], input=block.code, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands(block.code):
        read(words)


def commands(code):
    """The commands of a shell block, each as its words: no heredocs, assignments or comments."""
    code = re.sub(r"<<'(\w+)'(.*?)^\1$", [r"\2"][0], code, flags=re.MULTILINE | re.DOTALL)
    values = dict(re.findall(r"^(?:export )?(\w+)=\"([^\"]*)\"$", code, re.MULTILINE))
    for name, value in values.items():
        code = code.replace(f"${name}", value)
    text = re.sub(r"(^|\s)#.*$", "", code.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words = []
    for token in [*lexer, "\n"]:
        if set(token) <= set(";&|\n"):
            while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in ("do", "nice")):
                words.pop(0)
            if words:
                yield words
            words = []
        else:
            words.append(token)


def read(words):
    """Has the program read its arguments, without running."""
    program, *arguments = words
    program = Path(program).name
    if program == "cait":
        read_cait(arguments)
    elif program == "python" and arguments[:1] == ["train.py"]:
        read_train(arguments[1:])
    elif program == "python" and arguments[0].startswith("benchmarks/"):
        read_benchmark(*arguments)
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in arguments if "/" in path), words
    elif program == "pip" and arguments[0] == "install":
        for named in re.findall(r"\[([\w,]+)\]", " ".join(a for a in arguments if a[0] in ".c")):
            assert set(named.split(",")) <= set(EXTRAS), words
    elif program in ("bash", "sbatch"):
        script = next(word for word in arguments if word[0] != "-")
        assert (ROOT / script).exists(), words
        read_overrides("configs/cait_s24.py", arguments)


def read_cait(arguments):
    command, context = main, click.Context(main, info_name="cait")
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.get_command(context, name)
        assert command, name
        context = click.Context(command, context, name)
    overrides = [word for word in arguments if word.startswith("--config.")]
    context = command.make_context(
        name, [word for word in arguments if word not in overrides], context.parent
    )
    assert not context.args, context.args
    for file in context.params.get("configs", ()):
        read_overrides(file, overrides)


def read_train(arguments):
    line = parse_command_line(arguments)
    read_overrides(line.file, arguments)
    assert {word.lstrip("-").partition("=")[0] for word in line.rest} <= TRAIN_FLAGS, line.rest


def read_overrides(file, arguments):
    check_values(load_config(str(ROOT / file), parse_command_line(arguments).overrides))


class _Read(Exception):
    pass


def read_benchmark(script, *arguments):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *args, **options):
        parse(parser, *args, **options)
        raise _Read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT), *sys.path])
        with pytest.raises(_Read):
            runpy.run_path(str(ROOT / script), run_name="__main__")


TABLES = {
    ("README.md", "cait models 'cait_*' --pretrained --markdown"),
    ("docs/models.md", "cait models --markdown"),
    ("docs/results.md", "cait recipes --markdown"),
    ("docs/training.md", "cait recipes --keys --markdown"),
}


@pytest.mark.parametrize(
    ("page", "name"), slow_unless(lambda page, name: page != "docs/models.md", sorted(TABLES))
)
def test_a_table_is_what_its_command_prints(page, name):
    """`python tests/test_docs.py` writes the tables."""
    assert PAGES[page] == with_table(PAGES[page], name)


def with_table(text, name):
    """The page with the table between the comment `name` and the next comment `end` made anew."""
    before, rest = text.split(f"<!-- {name} -->\n")
    _, after = rest.split("<!-- end -->", 1)
    result = CliRunner().invoke(main, shlex.split(name)[1:], prog_name="cait")
    assert result.exit_code == 0
    table = result.stdout.rstrip("\n")
    return f"{before}<!-- {name} -->\n{table}\n<!-- end -->{after}"


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 130


@pytest.mark.parametrize("page", sorted(PAGES.keys() - HISTORY))
def test_every_key_and_file_that_is_named_exists(page):
    text = PAGES[page]
    keys = flatten(get_config())
    parts = {key.rpartition(".")[0] for key in keys}
    for key in re.findall(r"(?<![\w/.])(?:--)?config\.(?!json\b)([a-z_]+(?:\.[a-z_0-9]+)*)", text):
        assert key in keys or key in parts, key
    for path in re.findall(
        r"(?<![\w/.])(?:benchmarks|configs|docs|launch|tests|cait_jax)/[a-z][\w./]+\w", text
    ):
        assert (ROOT / path).exists() or (ROOT / path).parent.name == "docs", path
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\btest_\w+\.py", text)) <= tests


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", PAGES[page]):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_every_name_of_the_api_page_exists():
    names = re.findall(r"^::: ([\w.]+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert len(names) > 5
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


def released_weights(name, folder):
    """A released model's repository, and the bytes of a file of its shapes with random weights."""
    model = cait_jax.create_model(name)
    params = jax.tree.map(lambda leaf: leaf / 10, random_params(model))
    cait_jax.export_timm(folder / f"{name}.safetensors", model, {"params": params})
    return RELEASED[name].hub_id, (folder / f"{name}.safetensors").read_bytes()


@pytest.fixture(scope="session")
def environment(tmp_path_factory, compilation_cache):
    """Variables under which blocks run: the tree's own `python` and `cait`, and a hub on this machine."""
    folder = tmp_path_factory.mktemp("environment")
    programs = folder / "bin"
    programs.mkdir()
    for name, call in {"python": "", "cait": " -m cait_jax"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{call} "$@"\n')
        (programs / name).chmod(0o755)
    with serve_hub(dict(released_weights(name, folder) for name in DOWNLOADED)) as server:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        yield kept | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            **compilation_cache,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(folder / "hub"),
        }


@pytest.fixture(scope="session")
def trained(environment, tmp_path_factory):
    """A run of the digits, by the command of the pages."""
    folder = tmp_path_factory.mktemp("trained")
    command = "python train.py --config=configs/digits.py"
    assert f"\n{command}\n" in PAGES["docs/index.md"]
    lay_out(folder)
    execute(["bash", "-c", command], folder, environment)
    return folder / "runs" / "digits"


def lay_out(folder):
    """A working directory as a user's: the repository's files, a photograph, folders of pictures."""
    for name in FILES:
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    pictures = [folder / "dog.jpg", folder / "pictures" / "0.png"]
    pictures += [
        folder / "photographs" / split / name / f"{i}.jpg"
        for split, count in (("train", 6), ("val", 2))
        for name in ("cat", "dog")
        for i in range(count)
    ]
    for path in pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path)


def execute(command, folder, environment):
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_the_blocks_of_a_page_run(page, environment, trained, tmp_path):
    """In their order, in one folder; Python blocks that follow each other are one program."""
    lay_out(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "digits")
    program = ""
    for block in (*(block for block in RUN if block.page == page), None):
        if block is not None and block.language == "python":
            program += block.code
            continue
        if program:
            execute([sys.executable, "-c", program], tmp_path, environment)
            program = ""
        if block is not None and block.language == "bash":
            execute(["bash", "-euo", "pipefail", "-c", block.code], tmp_path, environment)


if __name__ == "__main__":
    for page, name in sorted(TABLES):
        (ROOT / page).write_text(with_table((ROOT / page).read_text(), name))
