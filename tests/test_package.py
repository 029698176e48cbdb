"""The built wheel and sdist work outside the repository."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built from the tree by the backend that is installed."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_is_imported_and_makes_a_model_outside_the_repository(built, tmp_path):
    wheel, _ = built
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps",
        "--disable-pip-version-check", str(wheel),
    )  # fmt: skip
    # The dependencies come from this environment. Its .pth files are not followed, so an editable
    # install of the repository in it stays out of sight.
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import cait_jax, jax, jax.numpy as jnp\n"
        "model = cait_jax.create_model('cait_nano4_patch4_8', num_classes=10, depth=1)\n"
        "variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))\n"
        "print(cait_jax.__file__, model.apply(variables, jnp.zeros((2, 8, 8, 1))).shape)\n"
    )
    file, shape = run(str(python), "-I", "-c", code, cwd=tmp_path).strip().split(" ", 1)
    assert Path(file).is_relative_to(site)
    assert shape == "(2, 10)"


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cait_jax"}
    package = [path for path in (ROOT / "cait_jax").rglob("*") if path.suffix not in ("", ".pyc")]
    ours = {str(path.relative_to(ROOT)) for path in package}
    assert "cait_jax/explain/report/report.js" in ours
    assert ours <= set(names)
    assert "cait_jax/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)


def test_the_sdist_holds_what_a_new_user_needs(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"train.py", "configs/digits.py", "README.md", "pyproject.toml", "LICENSE"} <= names
    assert {"CITATION.cff", "CONTRIBUTING.md", "mkdocs.yml", "docs/index.md", ".ci/run"} <= names
    assert "tests/fixtures/cait_small.npz" in names
    assert not {
        name for name in names if "__pycache__" in name or name.startswith(("runs/", "site/"))
    }


def test_import_of_the_installed_version_matches_the_metadata():
    from importlib.metadata import version

    import cait_jax

    assert version("cait-jax") == cait_jax.__version__
    assert f"\nversion: {cait_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {cait_jax.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
