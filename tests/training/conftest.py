"""Every test of training compiles, with runs or without."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled_once(compilation_cache):
    """See `worlds.compilation_cache`."""
