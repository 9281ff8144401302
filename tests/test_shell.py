"""Commands that are printed can be pasted: the program's own path, quoted names, installs by packages' own names."""

import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_jax import shell


def test_the_program_is_named_as_the_shell_finds_it(tmp_path, monkeypatch):
    own = tmp_path / "a venv" / "minimind"
    own.parent.mkdir()
    own.write_text("#!/bin/sh\necho here\n")
    own.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(own), "chat"])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    line = shell.command("chat", "--model", "runs/my run")
    assert shlex.split(line) == [str(own), "chat", "--model", "runs/my run"]
    assert subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout == "here\n"
    monkeypatch.chdir(tmp_path)
    assert shell.command("chat") == "'a venv/minimind' chat"
    told = "minimind: ~/minimind here is an adapter; minimind convert merge-lora makes `minimind chat` quicker"
    assert shell.with_program(told) == (
        "minimind: ~/minimind here is an adapter; 'a venv/minimind' convert merge-lora makes `'a venv/minimind' chat` "
        "quicker"
    )
    monkeypatch.setenv("PATH", f"{own.parent}:/bin")
    assert shell.command("chat", note="talk") == "minimind chat      # talk"
    other = tmp_path / "other" / "minimind"  # an older one, in front
    other.parent.mkdir()
    other.symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{other.parent}:{own.parent}:/bin")
    assert shell.command("chat") == "'a venv/minimind' chat"


def test_without_an_installed_script_it_is_the_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(shell.command("chat")) == [str(tmp_path / "python"), "-m", "minimind_jax", "chat"]


@pytest.mark.parametrize("extra", ["formats", "gcs", "track", "torch", "demo", "eval", "cuda12", "tpu"])
def test_an_extra_is_installed_by_the_names_of_its_packages(extra):
    line = shlex.split(shell.install_command(extra))
    python, packages = line[0], line[4:]
    assert Path(python).name.startswith("python") and line[1:4] == ["-m", "pip", "install"]
    assert packages and not any("minimind" in package for package in packages)
    assert extra in importlib.metadata.metadata("minimind-jax").get_all("Provides-Extra")
