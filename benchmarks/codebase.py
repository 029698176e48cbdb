"""How large the code base is: modules, lines, docstrings, configs, README.

Command: python benchmarks/codebase.py [ROOT]
  ROOT is the repository, the one that this file is in if not given.

Modules are the files of `cait_jax/` but `__init__.py` and `__main__.py`. Lines are all lines of all files;
those of docstrings count with their quotes.
"""

import argparse
import ast
from pathlib import Path

from tabulate import tabulate


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines())


def docstring_lines(file: Path) -> int:
    """Lines of the docstrings of a file's module, classes and functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, documented)]
    strings = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    return sum((string.end_lineno or string.lineno) - string.lineno + 1 for string in strings)


def figures(root: Path) -> list[tuple[str, str]]:
    """What the table shows: a name and a figure in a row."""
    files = sorted((root / "cait_jax").rglob("*.py"))
    modules = [file for file in files if file.name not in ("__init__.py", "__main__.py")]
    lines = sum(map(lines_of, files))
    largest = max(modules, key=lines_of)
    configs = sorted((root / "configs").glob("*.py"))
    readme = (root / "README.md").read_text()
    return [
        ("modules of cait_jax", f"{len(modules)}"),
        ("lines of cait_jax", f"{lines:,}"),
        ("largest module", f"{largest.relative_to(root)}, {lines_of(largest)} lines"),
        ("docstrings' share of the lines", f"{sum(map(docstring_lines, files)) / lines:.1%}"),
        ("configs", f"{len(configs)} files, {sum(map(lines_of, configs))} lines"),
        ("README.md", f"{len(readme.splitlines())} lines, {len(readme.split()):,} words"),
        ("lines of tests", f"{sum(map(lines_of, (root / 'tests').rglob('*.py'))):,}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1])
    print(tabulate(figures(parser.parse_args().root), disable_numparse=True))


if __name__ == "__main__":
    main()
