"""What no command has words for: told with a way out, or as a bug with its traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_jax.cli import main
from minimind_jax.errors import UserError
from minimind_jax.last_resort import explain
from minimind_jax.paths import cache_home


def raising(monkeypatch, error):
    def run(config):
        raise error

    monkeypatch.setattr("minimind_jax.pipeline.tools.report", run)
    return main(["report", "x"])


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/b"), "runs/a/b: No space left on device; free some"),
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", b"/root/\xff"), "change its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "disk that can be written"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "data.jsonl"), "data.jsonl: Is a directory"),
        (MemoryError(), "accumulation_steps larger"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 GiB\nmore"), "allocate 9 GiB"),
        (RuntimeError("Could not determine home directory."), "set HOME"),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), "not UTF-8"),
    ],
)
def test_a_trouble_of_the_machine_is_one_line_with_a_way_out(error, words, monkeypatch, capsys):
    assert raising(monkeypatch, error) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1 and "Traceback" not in printed


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("odd"), TypeError("no"), OSError("no file in it")])
def test_a_bug_keeps_its_traceback_and_says_where_the_run_is(error, monkeypatch, capsys):
    assert explain(error) is None and raising(monkeypatch, error) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "this is a bug" in printed and "saved is kept" in printed


@pytest.mark.parametrize("platform, way_out", [("cuda", "jax[cuda13]"), ("abacus", "unset JAX_PLATFORMS")])
def test_devices_that_jax_cannot_use_are_told(platform, way_out):
    code = "import jax, sys; from minimind_jax.cli import main; from minimind_jax.pipeline import tools\n"
    code += "tools.report = lambda config: jax.devices(); sys.exit(main(['report', 'x']))"
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and way_out in done.stderr and f"JAX_PLATFORMS is {platform}" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_home_the_cache_needs_a_name(monkeypatch, tmp_path):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MINIMIND_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UserError, match="set MINIMIND_CACHE"):
        cache_home()
    assert cache_home(str(tmp_path)) == tmp_path
    monkeypatch.setenv("MINIMIND_CACHE", "kept")
    assert cache_home() == Path("kept")
