"""Compiled programs are kept: what a command has compiled is there when it is next called."""

import os
import sys

from minimind_jax.errors import UserError
from minimind_jax.paths import cache_home

FOLDER, SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_programs() -> None:
    """Keeps what takes 0.1 s to compile in $MINIMIND_CACHE/xla or ~/.cache/minimind_jax/xla; JAX's own variables win.

    Call it before JAX computes anything; it need not be imported.
    """
    try:
        settings = {FOLDER: str(cache_home() / "xla"), SECONDS: 0.1}
    except UserError as error:  # the command goes on without, and tokens may have a folder of their own
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    for name, value in settings.items():
        if "jax" not in sys.modules:
            os.environ.setdefault(name, str(value))
        elif name not in os.environ and not (name == FOLDER and sys.modules["jax"].config.jax_compilation_cache_dir):
            sys.modules["jax"].config.update(name.lower(), value)
