"""`minimind serve --open`."""

import os
import subprocess
import sys

import pytest

from minimind_jax.config.serving import ServeConfig

OPEN = "from minimind_jax.serve.listening import open_page; print(open_page('http://0.0.0.0:8000'))"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="these have windows always")
def test_the_browser_is_opened_where_there_is_one(tmp_path):
    def opened(**more):
        without = {
            name: value for name, value in os.environ.items() if not name.endswith("DISPLAY") and name != "BROWSER"
        }
        command = [sys.executable, "-c", OPEN]
        return subprocess.run(
            command, env={**without, **more}, capture_output=True, text=True, check=True
        ).stdout.strip()

    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/shown\n')
    browser.chmod(0o755)
    assert opened() == "False"
    assert opened(BROWSER=str(browser)) == "True"
    assert (tmp_path / "shown").read_text() == "http://127.0.0.1:8000\n"


def test_there_must_be_a_page_to_open():
    with pytest.raises(ValueError, match="--web"):
        ServeConfig(model=("x",), open=True)
