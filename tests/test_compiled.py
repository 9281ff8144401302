"""What a command has compiled is kept for its next call, unless JAX was told otherwise."""

import os
import subprocess
import sys

import pytest

TELL = """
import os, sys
from minimind_jax.compiled import FOLDER, SECONDS, keep_programs
if "loaded" in sys.argv: import jax
keep_programs()
assert ("jax" in sys.modules) == ("loaded" in sys.argv)
import jax
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
"""


def told(*arguments, **environment):
    without = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    words = [sys.executable, "-c", TELL, *arguments]
    return subprocess.run(words, env={**without, **environment}, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("when", ["before", "loaded"])
def test_programs_are_kept_in_the_cache(when):
    assert told(when, MINIMIND_CACHE="/kept").strip() == "/kept/xla 0.1"
    own = {"JAX_COMPILATION_CACHE_DIR": "/own", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    assert told(when, MINIMIND_CACHE="/kept", **own).strip() == "/own 7.0"
