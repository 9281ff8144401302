"""Every test of training compiles, with runs or without."""

import pytest
from kills import start  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def compiled_once(compilation_cache):
    """See `worlds.compilation_cache`."""
