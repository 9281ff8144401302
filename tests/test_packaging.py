"""The wheel: everything that is needed outside the checkout, and nothing left out of it."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from minimind_jax.config.settings import config_folder

ROOT = Path(__file__).resolve().parent.parent


def packages_of_the_project() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_every_package_is_listed():
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "minimind_jax").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"minimind_jax.configs"} == set(packages_of_the_project())


def test_a_checkout_uses_its_own_configs():
    assert config_folder() == ROOT / "configs"


def test_licence_and_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'__version__ = "{project["version"]}"' in (ROOT / "minimind_jax" / "__init__.py").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert not any("cuda" in need or "tpu" in need for need in project["dependencies"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel that `python -m build` makes, by way of the source archive, unpacked where no checkout is."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run_outside(installed, folder, program, *arguments):
    """Runs a Python program in `folder` with the unpacked wheel in place of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_wheel_holds_the_configs_and_no_tests(installed):
    names = {file.stem for file in (installed / "minimind_jax" / "configs").iterdir()}
    assert names == {file.stem for file in (ROOT / "configs").glob("*.yaml")}
    assert sorted(entry.name for entry in installed.iterdir() if entry.suffix != ".dist-info") == ["minimind_jax"]


def test_the_wheel_holds_the_chat_page_with_its_licences(installed):
    def files(root):
        folder = root / "minimind_jax" / "serve" / "page"
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}

    assert files(installed) == files(ROOT)
    assert {"index.html", "js/app.js", "vendor/marked.js", "vendor/marked.LICENSE"} <= files(installed)


def test_the_wheel_works_outside_the_checkout(installed, tmp_path):
    found = run_outside(installed, tmp_path, "import minimind_jax; print(minimind_jax.__file__)")
    assert found.stdout.startswith(str(installed))

    (tmp_path / "text.jsonl").write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 20)
    command = "import sys; from minimind_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ("tokenizer", "--config", "tokenizer", "--data", "text.jsonl", "--output", "new", "--vocab_size", "300")
    trained = run_outside(installed, tmp_path, command, *arguments)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (tmp_path / "new" / "chat_template.jinja").is_file()
